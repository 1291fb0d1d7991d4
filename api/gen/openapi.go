package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"

	"google.golang.org/protobuf/types/pluginpb"
)

// object is any JSON object. Go writes its keys sorted, so the merged document is stable.
type object = map[string]any

// problem is the schema of every error: RFC 9457.
var problem = object{
	"type": "object", "description": "A problem document (RFC 9457).",
	"properties": object{
		"type":   object{"type": "string", "description": "Always about:blank."},
		"title":  object{"type": "string", "description": "The HTTP status in words."},
		"status": object{"type": "integer", "description": "The HTTP status."},
		"detail": object{"type": "string", "description": "What was found, what is allowed, what to do next."},
		"code":   object{"type": "string", "description": "The gRPC code, for example PERMISSION_DENIED."},
	},
	"required": []string{"type", "title", "status", "code"},
}

// mergeOpenAPI makes one OpenAPI 3.1 document of one for each proto file, and adds what no proto says: errors and bearer tokens.
func mergeOpenAPI(files []*pluginpb.CodeGeneratorResponse_File) ([]byte, error) {
	paths, schemas, tags := object{}, object{}, []any{}
	for _, f := range files {
		var doc struct {
			OpenAPI    string                   `json:"openapi"`
			Paths      object                   `json:"paths"`
			Tags       []any                    `json:"tags"`
			Components struct{ Schemas object } `json:"components"`
		}
		if err := json.Unmarshal([]byte(f.GetContent()), &doc); err != nil {
			return nil, fmt.Errorf("%s: %w", f.GetName(), err)
		}
		maps.Copy(paths, doc.Paths)
		maps.Copy(schemas, doc.Components.Schemas)
		tags = append(tags, doc.Tags...)
	}
	schemas["problem"] = problem
	for _, item := range paths {
		for _, op := range item.(object) {
			if o, ok := op.(object); ok {
				o["responses"].(object)["default"] = object{
					"description": "What went wrong.",
					"content":     object{"application/problem+json": object{"schema": object{"$ref": "#/components/schemas/problem"}}},
				}
			}
		}
	}
	doc := object{
		"openapi":    "3.1.0",
		"info":       object{"title": "Bulkhead", "version": "v1", "description": "The API of a Bulkhead node. Streams are newline-delimited JSON, or server-sent events with Accept: text/event-stream."},
		"paths":      paths,
		"tags":       tags,
		"components": object{"schemas": schemas, "securitySchemes": object{"bearer": object{"type": "http", "scheme": "bearer", "bearerFormat": "JWT", "description": "bhctl token"}}},
		"security":   []any{object{"bearer": []any{}}},
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	err := enc.Encode(doc)
	return b.Bytes(), err
}
