// Gen turns the proto files under api/ into Go, REST handlers and the OpenAPI document.
//
// It needs nothing but Go: protos are compiled in this process (there is no protoc to install), and the
// generators are tools of go.mod, so that every machine generates the same bytes. Run it with "make gen".
package main

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"

	"github.com/bufbuild/protocompile"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/pluginpb"

	// Imported for the files they register, which our protos import.
	_ "google.golang.org/genproto/googleapis/api/annotations"
	_ "google.golang.org/protobuf/types/known/timestamppb"
)

const module = "github.com/bulkhead-os/bulkhead"

// plugins are run in this order; services says whether one is fed only files with services.
var plugins = []struct {
	tool, params string
	services     bool
}{
	{"protoc-gen-go", "module=" + module, false},
	{"protoc-gen-go-grpc", "module=" + module, true},
	{"protoc-gen-grpc-gateway", "module=" + module, true},
	{"protoc-gen-openapiv3", "disable_default_errors=true", true},
}

func main() {
	if err := run(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "gen:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	names, err := protos()
	if err != nil {
		return err
	}
	files, err := compile(ctx, names)
	if err != nil {
		return err
	}
	for _, p := range plugins {
		req := &pluginpb.CodeGeneratorRequest{ProtoFile: files}
		if p.params != "" {
			req.Parameter = proto.String(p.params)
		}
		for _, f := range files {
			own := strings.HasPrefix(f.GetOptions().GetGoPackage(), module)
			if own && (!p.services || len(f.Service) > 0) {
				req.FileToGenerate = append(req.FileToGenerate, f.GetName())
			}
		}
		if err := generate(ctx, p.tool, req); err != nil {
			return fmt.Errorf("%s: %w", p.tool, err)
		}
	}
	if err := write("internal/methods/table.go", table(files)); err != nil {
		return err
	}
	return write("config/methods.go", granted(files))
}

// protos lists the proto files below api/, as they import each other, sorted.
func protos() ([]string, error) {
	var names []string
	err := fs.WalkDir(os.DirFS("api"), ".", func(path string, d fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, ".proto") {
			names = append(names, path)
		}
		return err
	})
	if len(names) == 0 && err == nil {
		err = fmt.Errorf("no proto file under api/: run it from the root of the repository")
	}
	sort.Strings(names)
	return names, err
}

// compile returns the files and all they import, each after what it imports, with comments kept.
func compile(ctx context.Context, names []string) ([]*descriptorpb.FileDescriptorProto, error) {
	linked := protocompile.ResolverFunc(func(path string) (protocompile.SearchResult, error) {
		d, err := protoregistry.GlobalFiles.FindFileByPath(path)
		if err != nil {
			return protocompile.SearchResult{}, err
		}
		return protocompile.SearchResult{Desc: d}, nil
	})
	c := protocompile.Compiler{
		Resolver:       protocompile.CompositeResolver{&protocompile.SourceResolver{ImportPaths: []string{"api"}}, linked},
		SourceInfoMode: protocompile.SourceInfoStandard,
	}
	res, err := c.Compile(ctx, names...)
	if err != nil {
		return nil, err
	}
	var out []*descriptorpb.FileDescriptorProto
	seen := map[string]bool{}
	var add func(protoreflect.FileDescriptor)
	add = func(d protoreflect.FileDescriptor) {
		if seen[d.Path()] {
			return
		}
		seen[d.Path()] = true
		for i := range d.Imports().Len() {
			add(d.Imports().Get(i).FileDescriptor)
		}
		out = append(out, protodesc.ToFileDescriptorProto(d))
	}
	for _, f := range res {
		add(f)
	}
	return out, nil
}

// generate runs one plugin and writes what it returns; a file whose bytes are the same is left alone.
func generate(ctx context.Context, tool string, req *pluginpb.CodeGeneratorRequest) error {
	in, err := proto.Marshal(req)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "tool", tool)
	cmd.Stdin, cmd.Stderr = bytes.NewReader(in), os.Stderr
	raw, err := cmd.Output()
	if err != nil {
		return err
	}
	var resp pluginpb.CodeGeneratorResponse
	if err := proto.Unmarshal(raw, &resp); err != nil {
		return err
	}
	if resp.Error != nil {
		return fmt.Errorf("%s", resp.GetError())
	}
	for _, f := range resp.File {
		if strings.HasSuffix(f.GetName(), ".openapi.json") {
			continue // merged below
		}
		if err := write(f.GetName(), []byte(f.GetContent())); err != nil {
			return err
		}
	}
	if tool != "protoc-gen-openapiv3" {
		return nil
	}
	doc, err := mergeOpenAPI(resp.File)
	if err != nil {
		return err
	}
	return write("gateway/openapi.json", doc)
}

// write replaces a file unless it has these bytes already.
func write(path string, content []byte) error {
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, content) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	fmt.Println("wrote", path)
	return os.WriteFile(path, content, 0o644)
}
