package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"strings"

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
	if err := addNodes(paths); err != nil {
		return nil, err
	}
	for _, item := range paths {
		for _, op := range item.(object) {
			if o, ok := op.(object); ok { // not a list of parameters
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
		"components": object{"schemas": schemas, "parameters": nodeParameters, "securitySchemes": object{"bearer": object{"type": "http", "scheme": "bearer", "bearerFormat": "JWT", "description": "bhctl token"}}},
		"security":   []any{object{"bearer": []any{}}},
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	err := enc.Encode(doc)
	return b.Bytes(), err
}

// nodeParameters say which node is to answer; the gateway takes them off before it looks at the rest.
var nodeParameters = object{
	"node": object{"name": "node", "in": "query", "schema": object{"type": "string"},
		"description": "The node that is to answer, by its name; a control plane passes the request on. Without it the node answers that was connected with."},
	"nodeInPath": object{"name": "node", "in": "path", "required": true, "schema": object{"type": "string"},
		"description": "The node that is to answer, by its name; a control plane passes the request on."},
}

// nodePath is where every path is once more, with a node's name.
const nodePath = "/v1/nodes/{node}"

// addNodes gives every path a query parameter for the node, and puts a copy below nodePath. Names of operations must be unique: those of the copies end in OnNode.
func addNodes(paths object) error {
	copies := object{}
	for path, item := range paths {
		rest, ok := strings.CutPrefix(path, "/v1")
		if !ok || strings.HasPrefix(path, nodePath+"/") {
			return fmt.Errorf("path %s: it must begin with /v1/, and not with %s/, which is for other nodes", path, nodePath)
		}
		raw, err := json.Marshal(item)
		if err != nil {
			return err
		}
		var twin object
		if err := json.Unmarshal(raw, &twin); err != nil {
			return err
		}
		for _, op := range twin {
			if o, ok := op.(object); ok {
				if id, ok := o["operationId"].(string); ok {
					o["operationId"] = id + "OnNode"
				}
			}
		}
		twin["parameters"] = []any{object{"$ref": "#/components/parameters/nodeInPath"}}
		item.(object)["parameters"] = []any{object{"$ref": "#/components/parameters/node"}}
		copies[nodePath+rest] = twin
	}
	maps.Copy(paths, copies)
	return nil
}
