package config

import (
	"bytes"
	"fmt"
	"net/netip"
	"reflect"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Marshal writes a set as canonical YAML: equal sets give equal bytes, and Parse returns the set again. Kinds that are nil
// and fields that are zero are left out. The set must be valid.
func Marshal(s Set) []byte { return Section(s, Kinds()...) }

// Section writes the documents that one daemon needs, as Marshal does.
func Section(s Set, kinds ...Kind) []byte {
	var out bytes.Buffer
	for _, k := range kinds {
		v := s.slot(k)
		if !v.IsValid() || v.IsNil() {
			continue
		}
		if out.Len() > 0 {
			out.WriteString("---\n")
		}
		n := toNode(v.Elem())
		n.Content = append([]*yaml.Node{text("apiVersion"), text(APIVersion), text("kind"), text(string(k))}, n.Content...)
		e := yaml.NewEncoder(&out)
		e.SetIndent(2)
		if err := e.Encode(n); err == nil {
			err = e.Close()
			if err != nil {
				panic("config: marshal: " + err.Error()) // a bytes.Buffer takes everything
			}
		} else {
			panic("config: marshal: " + err.Error())
		}
	}
	return out.Bytes()
}

func text(s string) *yaml.Node { return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: s} }

// toNode writes any value of the document's types.
func toNode(v reflect.Value) *yaml.Node {
	if s, ok := v.Interface().(fmt.Stringer); ok { // netip.Addr, netip.Prefix, Size
		return text(s.String())
	}
	switch v.Kind() {
	case reflect.Struct:
		n := &yaml.Node{Kind: yaml.MappingNode}
		for i, name := range names(v.Type()) {
			if f := v.Field(i); !empty(f) {
				n.Content = append(n.Content, text(name), toNode(f))
			}
		}
		return n
	case reflect.Slice:
		n := &yaml.Node{Kind: yaml.SequenceNode}
		for i := range v.Len() {
			n.Content = append(n.Content, toNode(v.Index(i)))
		}
		return n
	case reflect.Pointer:
		return toNode(v.Elem())
	case reflect.Bool:
		return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!bool", Value: strconv.FormatBool(v.Bool())}
	case reflect.Int:
		return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!int", Value: strconv.FormatInt(v.Int(), 10)}
	default:
		return text(v.String())
	}
}

// empty reports whether a field is left out: zero, or a struct or list of nothing.
func empty(v reflect.Value) bool {
	switch {
	case v.Kind() == reflect.Slice:
		return v.Len() == 0
	case v.Kind() == reflect.Struct && v.Type() != addrType && v.Type() != prefixType:
		for i := range v.NumField() {
			if !empty(v.Field(i)) {
				return false
			}
		}
		return true
	}
	return v.IsZero()
}

// Equal reports whether two sets mean the same.
func Equal(a, b Set) bool { return bytes.Equal(Marshal(a), Marshal(b)) }

// Diff says what differs from a to b, one line for each field, in the order of the fields: `Network.interfaces[eth0].mtu:
// 1500 -> 1400`. Interfaces are told apart by their names, entries of other lists by their value. Nil if nothing differs.
func Diff(a, b Set) []string {
	a, b = a.copy(), b.copy()
	a.fill()
	b.fill()
	var d differ
	for _, k := range Kinds() {
		d.values(string(k), a.slot(k).Elem(), b.slot(k).Elem())
	}
	return d
}

type differ []string

func (d *differ) values(at string, a, b reflect.Value) {
	switch {
	case a.Kind() == reflect.Struct && a.Type() != addrType && a.Type() != prefixType:
		for i, name := range names(a.Type()) {
			d.values(at+"."+name, a.Field(i), b.Field(i))
		}
	case a.Type() == reflect.TypeFor[[]Interface]():
		d.interfaces(at, a.Interface().([]Interface), b.Interface().([]Interface))
	case a.Kind() == reflect.Slice:
		d.lists(at, a, b)
	default:
		if x, y := inline(a), inline(b); x != y {
			*d = append(*d, at+": "+x+" -> "+y)
		}
	}
}

func (d *differ) interfaces(at string, a, b []Interface) {
	find := func(list []Interface, name LinkName) (Interface, bool) {
		for _, l := range list {
			if l.Name == name {
				return l, true
			}
		}
		return Interface{}, false
	}
	for _, l := range a {
		here := at + "[" + string(l.Name) + "]"
		if other, ok := find(b, l.Name); ok {
			d.values(here, reflect.ValueOf(l), reflect.ValueOf(other))
		} else {
			*d = append(*d, here+": - "+inline(reflect.ValueOf(l)))
		}
	}
	for _, l := range b {
		if _, ok := find(a, l.Name); !ok {
			*d = append(*d, at+"["+string(l.Name)+"]: + "+inline(reflect.ValueOf(l)))
		}
	}
}

// lists compares lists as what stands in them; if only the order differs, it says so.
func (d *differ) lists(at string, a, b reflect.Value) {
	count := map[string]int{}
	for i := range a.Len() {
		count[inline(a.Index(i))]++
	}
	var added []string
	for i := range b.Len() {
		if e := inline(b.Index(i)); count[e] > 0 {
			count[e]--
		} else {
			added = append(added, at+": + "+e)
		}
	}
	before := len(*d)
	for i := range a.Len() {
		if e := inline(a.Index(i)); count[e] > 0 {
			count[e]--
			*d = append(*d, at+": - "+e)
		}
	}
	*d = append(*d, added...)
	if len(*d) == before && inline(a) != inline(b) {
		*d = append(*d, at+": order "+inline(a)+" -> "+inline(b))
	}
}

// inline writes a value on one line.
func inline(v reflect.Value) string {
	switch x := v.Interface().(type) {
	case netip.Prefix:
		if !x.IsValid() {
			return "(none)"
		}
		return x.String()
	case netip.Addr:
		if !x.IsValid() {
			return "(none)"
		}
		return x.String()
	case Size:
		return x.String()
	}
	switch v.Kind() {
	case reflect.Pointer:
		if v.IsNil() {
			return "(none)"
		}
		return inline(v.Elem())
	case reflect.Slice:
		var all []string
		for i := range v.Len() {
			all = append(all, inline(v.Index(i)))
		}
		return "[" + strings.Join(all, ", ") + "]"
	case reflect.Struct:
		var all []string
		for i, name := range names(v.Type()) {
			if f := v.Field(i); !empty(f) {
				all = append(all, name+": "+inline(f))
			}
		}
		return "{" + strings.Join(all, ", ") + "}"
	case reflect.String:
		if v.Len() == 0 {
			return "(none)"
		}
		return v.String()
	}
	return fmt.Sprint(v.Interface())
}
