package main

import (
	"regexp"
	"strings"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"go.yaml.in/yaml/v4"
)

// Omni replaces what its validator cannot stand before it reads the text.
var notANumber = regexp.MustCompile(`(?i)\.nan`)

type classAnswer struct {
	// YAML: the text is none.
	YAML string `json:"yaml"`
	// Schema: what it says is not what the schema wants.
	Schema string `json:"schema"`
	// Data: what it says, where the schema is content.
	Data any `json:"data"`
}

// classes compiles a schema, and checks provider data with it as Omni does.
func classes(schema string) (func(string) classAnswer, error) {
	parsed, err := jsonschema.UnmarshalJSON(strings.NewReader(schema))
	if err != nil {
		return nil, err
	}

	compiler := jsonschema.NewCompiler()
	if err = compiler.AddResource("schema.json", parsed); err != nil {
		return nil, err
	}

	compiled, err := compiler.Compile("schema.json")
	if err != nil {
		return nil, err
	}

	return func(class string) classAnswer {
		var data any

		if err := yaml.Unmarshal([]byte(notANumber.ReplaceAllString(class, "null")), &data); err != nil {
			return classAnswer{YAML: err.Error()}
		}

		if data == nil {
			data = map[string]any{}
		}

		if err := compiled.Validate(data); err != nil {
			return classAnswer{Schema: err.Error()}
		}

		return classAnswer{Data: data}
	}, nil
}
