package config

import (
	"net/netip"
	"reflect"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

var (
	addrType   = reflect.TypeFor[netip.Addr]()
	prefixType = reflect.TypeFor[netip.Prefix]()
	sizeType   = reflect.TypeFor[Size]()
)

// names returns the names of a struct's fields as they are written, in their order.
func names(t reflect.Type) []string {
	out := make([]string, t.NumField())
	for i := range out {
		out[i], _, _ = strings.Cut(t.Field(i).Tag.Get("yaml"), ",")
	}
	return out
}

// node reads any node; the path in at is for messages.
func (p *parser) node(n *yaml.Node, v reflect.Value, at string, depth int) {
	p.lines[at] = n.Line
	switch {
	case depth > maxDepth:
		p.problem(n.Line, at, "nested deeper than %d", maxDepth)
	case n.Kind == yaml.AliasNode || n.Anchor != "":
		p.problem(n.Line, at, "anchors and aliases are not read; write the value out")
	case n.Style&yaml.TaggedStyle != 0:
		p.problem(n.Line, at, "tag %s is not read; remove it", found(n.Tag))
	case n.Kind == yaml.ScalarNode && n.Tag == "!!null":
		p.problem(n.Line, at, "has no value; remove the line for the default, or give it one")
	case v.Type() == addrType, v.Type() == prefixType, v.Type() == sizeType:
		p.scalar(n, v, at)
	case v.Kind() == reflect.Struct:
		p.mapping(n, v, at, depth)
	case v.Kind() == reflect.Slice:
		p.sequence(n, v, at, depth)
	case v.Kind() == reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		p.scalar(n, v.Elem(), at)
	default:
		p.scalar(n, v, at)
	}
}

func (p *parser) mapping(n *yaml.Node, v reflect.Value, at string, depth int) {
	p.lines[at] = n.Line
	if n.Kind != yaml.MappingNode {
		p.problem(n.Line, at, "must be a mapping with the fields %s", strings.Join(names(v.Type()), ", "))
		return
	}
	if n.Anchor != "" || n.Style&yaml.TaggedStyle != 0 {
		p.problem(n.Line, at, "anchors and tags are not read; remove them")
		return
	}
	have := map[string]int{}
	all := names(v.Type())
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		field := at + "." + shortened(key.Value)
		if first, twice := have[key.Value]; twice {
			p.problem(key.Line, field, "stands here twice; the first is in line %d", first)
			continue
		}
		have[key.Value] = key.Line
		if depth == 1 && (key.Value == "apiVersion" || key.Value == "kind") {
			if value.Kind != yaml.ScalarNode || value.Anchor != "" || value.Style&yaml.TaggedStyle != 0 {
				p.problem(value.Line, field, "must be a plain word")
			}
			continue
		}
		index := -1
		for j, name := range all {
			if name == key.Value && key.Kind == yaml.ScalarNode {
				index = j
			}
		}
		if index < 0 {
			p.problem(key.Line, field, "%s", noSuch("field", key.Value, all))
			continue
		}
		p.node(value, v.Field(index), field, depth+1)
	}
	if r := rule(at); r.some && len(have) == 0 {
		p.problem(n.Line, at, "is empty; allowed: %s", r.allowed)
	}
	for _, name := range all {
		if field := at + "." + name; rule(field).required && have[name] == 0 {
			p.problem(n.Line, field, "is missing; allowed: %s", rule(field).permits())
		}
	}
}

// shortened keeps a foreign field's name from filling the message.
func shortened(key string) string {
	q := found(key)
	if q == `"`+key+`"` && key != "" && !strings.ContainsAny(key, " .[]:") {
		return key
	}
	return q
}

func (p *parser) sequence(n *yaml.Node, v reflect.Value, at string, depth int) {
	if n.Kind != yaml.SequenceNode {
		p.problem(n.Line, at, "must be a list: each entry on a line of its own, after \"- \"")
		return
	}
	if most := rule(at).listMax(); len(n.Content) > most {
		p.problem(n.Line, at, "has %d entries; at most %d are allowed", len(n.Content), most)
		return
	}
	if len(n.Content) == 0 {
		return // nil, so that equal documents give equal sets
	}
	v.Set(reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content)))
	for i, e := range n.Content {
		p.node(e, v.Index(i), at+"["+strconv.Itoa(i)+"]", depth+1)
	}
}

func (f field) listMax() int {
	if f.most != 0 {
		return f.most
	}
	return maxList
}

// scalar reads one value and checks it against its rule.
func (p *parser) scalar(n *yaml.Node, v reflect.Value, at string) {
	r := rule(at)
	if n.Kind != yaml.ScalarNode {
		p.problem(n.Line, at, "must be one value, not a list or mapping; allowed: %s", r.permits())
		return
	}
	bad := func(why, allowed string) { p.problem(n.Line, at, "%s %s; allowed: %s", found(n.Value), why, allowed) }
	switch {
	case v.Type() == sizeType:
		s, err := ParseSize(n.Value)
		if err != nil {
			bad("is not a size", "a number with KiB, MiB, GiB or TiB, like \""+Size(max(r.min, 1<<20)).String()+"\"")
			return
		}
		v.Set(reflect.ValueOf(s))
	case v.Kind() == reflect.Bool:
		if n.Tag != "!!bool" {
			bad("is neither true nor false", "true, false")
			return
		}
		v.SetBool(strings.EqualFold(n.Value, "true"))
	case v.Kind() == reflect.Int:
		i, err := strconv.ParseInt(n.Value, 10, 64)
		if n.Tag != "!!int" || err != nil {
			bad("is not a number", r.permits())
			return
		}
		v.SetInt(i)
	case n.Tag != "!!str":
		bad("is not text; put it in quotes", r.permits())
		return
	case v.Type() == addrType:
		a, err := netip.ParseAddr(n.Value)
		if err != nil || a.Zone() != "" {
			bad("is not an address", r.permits())
			return
		}
		v.Set(reflect.ValueOf(a))
	case v.Type() == prefixType:
		a, err := netip.ParsePrefix(n.Value)
		if err != nil {
			bad("is not an address with a prefix length", r.permits())
			return
		}
		v.Set(reflect.ValueOf(a))
	case v.Kind() == reflect.String:
		v.SetString(n.Value)
	default:
		panic("config: no way to read a " + v.Type().String())
	}
	if text := r.check(v); text != "" {
		p.problem(n.Line, at, "%s", text)
	}
}
