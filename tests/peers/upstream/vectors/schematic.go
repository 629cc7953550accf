package main

import (
	"context"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/siderolabs/image-factory/pkg/schematic"
	"github.com/siderolabs/omni/client/api/omni/specs"
	"github.com/siderolabs/omni/client/pkg/infra/provision"
	"github.com/siderolabs/omni/client/pkg/omni/resources/infra"
	"go.uber.org/zap"
)

type schematicInput struct {
	KernelArgs []string `json:"kernel_args"`
	Meta       []struct {
		Key   uint32 `json:"key"`
		Value string `json:"value"`
	} `json:"meta"`
	Extensions []string `json:"extensions"`
	Overlay    *struct {
		Name  string `json:"name"`
		Image string `json:"image"`
	} `json:"overlay"`
	// What the provider adds.
	CloudKernelArgs []string `json:"cloud_kernel_args"`
	CloudExtensions []string `json:"cloud_extensions"`
}

type schematicAnswer struct {
	YAML  string `json:"yaml"`
	ID    string `json:"id"`
	Error string `json:"error"`
	// Faithful: upstream reads its own text back as what was written.
	Faithful bool `json:"faithful"`
}

// keeper is an image factory that keeps what it is given.
type keeper struct {
	given schematic.Schematic
}

// EnsureSchematic implements provision.FactoryClient.
func (k *keeper) EnsureSchematic(_ context.Context, given schematic.Schematic) (string, error) {
	k.given = given

	return given.ID()
}

// assemble has the library make a request's schematic.
func assemble(in schematicInput) schematicAnswer {
	request := infra.NewMachineRequest("request")
	spec := request.TypedSpec().Value
	spec.KernelArgs = in.KernelArgs
	spec.Extensions = in.Extensions

	for _, meta := range in.Meta {
		spec.MetaValues = append(spec.MetaValues, &specs.MetaValue{Key: meta.Key, Value: meta.Value})
	}

	if in.Overlay != nil {
		spec.Overlay = &specs.Overlay{Name: in.Overlay.Name, Image: in.Overlay.Image}
	}

	var factory keeper

	context_ := provision.NewContext(request, nil, (*infra.MachineRequest)(nil), provision.ConnectionParams{}, &factory, nil)

	id, err := context_.GenerateSchematicID(
		context.Background(),
		zap.NewNop(),
		provision.WithoutConnectionParams(),
		provision.WithExtraKernelArgs(in.CloudKernelArgs...),
		provision.WithExtraExtensions(in.CloudExtensions...),
	)
	if err != nil {
		return schematicAnswer{Error: err.Error()}
	}

	yaml, err := factory.given.Marshal()
	if err != nil {
		return schematicAnswer{Error: err.Error()}
	}

	back, err := schematic.Unmarshal(yaml)

	return schematicAnswer{
		YAML:     string(yaml),
		ID:       id,
		Faithful: err == nil && cmp.Equal(*back, factory.given, cmpopts.EquateEmpty()),
	}
}

type readSchematic struct {
	Schematic *schematic.Schematic `json:"schematic"`
	Error     string               `json:"error"`
}

// readBack has the factory read a schematic, as Omni does before it passes one on.
func readBack(yaml string) readSchematic {
	read, err := schematic.Unmarshal([]byte(yaml))

	return readSchematic{Schematic: read, Error: text(err)}
}
