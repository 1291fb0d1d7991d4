package config

import (
	"encoding/json"
	"reflect"
)

// Schema returns the JSON Schema (draft 2020-12) of one kind's documents, for editors; nil if there is no such kind. What
// lies between fields is not in it: only Parse has the last word.
func Schema(k Kind) []byte {
	v := new(Set).slot(k)
	if !v.IsValid() {
		return nil
	}
	s := schemaOf(v.Type().Elem(), string(k))
	s["$schema"] = "https://json-schema.org/draft/2020-12/schema"
	s["title"] = string(k)
	properties := s["properties"].(map[string]any)
	properties["apiVersion"] = map[string]any{"const": APIVersion}
	properties["kind"] = map[string]any{"const": string(k)}
	required, _ := s["required"].([]string)
	s["required"] = append([]string{"apiVersion", "kind"}, required...)
	out, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		panic("config: schema: " + err.Error()) // maps, strings and numbers only
	}
	return append(out, '\n')
}

func schemaOf(t reflect.Type, at string) map[string]any {
	r := rule(at)
	s := map[string]any{}
	if r.doc != "" {
		s["description"] = r.doc
		if r.standard != "" {
			s["description"] = r.doc + " Default: " + r.standard + "."
		}
	}
	switch {
	case t == addrType, t == prefixType, t == sizeType:
		s["type"] = "string"
	case t.Kind() == reflect.Pointer:
		return schemaOf(t.Elem(), at)
	case t.Kind() == reflect.Struct:
		s["type"] = "object"
		s["additionalProperties"] = false
		properties := map[string]any{}
		var required []string
		for i, name := range names(t) {
			properties[name] = schemaOf(t.Field(i).Type, at+"."+name)
			if rule(at + "." + name).required {
				required = append(required, name)
			}
		}
		s["properties"] = properties
		if required != nil {
			s["required"] = required
		}
	case t.Kind() == reflect.Slice:
		s["type"] = "array"
		s["maxItems"] = r.listMax()
		item := schemaOf(t.Elem(), at)
		delete(item, "description")
		s["items"] = item
		return s
	case t.Kind() == reflect.Bool:
		s["type"] = "boolean"
	case t.Kind() == reflect.Int:
		s["type"] = "integer"
		s["maximum"] = r.max
		s["minimum"] = r.min
		if r.zero {
			delete(s, "minimum")
			delete(s, "maximum")
			s["anyOf"] = []any{map[string]any{"const": 0}, map[string]any{"minimum": r.min, "maximum": r.max}}
		}
	default:
		s["type"] = "string"
	}
	if r.oneOf != nil {
		s["enum"] = r.oneOf
	}
	if r.pattern != "" && t.Kind() != reflect.Struct {
		s["pattern"] = r.pattern
	}
	return s
}
