package main

import (
	"fmt"
	"sync"

	"github.com/siderolabs/talos/pkg/machinery/config"
	"github.com/siderolabs/talos/pkg/machinery/config/configloader"
	"github.com/siderolabs/talos/pkg/machinery/config/configpatcher"
	"github.com/siderolabs/talos/pkg/machinery/config/generate"
	"github.com/siderolabs/talos/pkg/machinery/config/machine"
	"github.com/siderolabs/talos/pkg/machinery/config/validation"
)

// mode is what Talos runs in.
type mode string

const (
	metal = mode("metal")
	cloud = mode("cloud")
)

func (m mode) String() string { return string(m) }

// RequiresInstall implements validation.RuntimeMode: only on metal there is something to install onto.
func (m mode) RequiresInstall() bool { return m == metal }

// InContainer implements validation.RuntimeMode.
func (m mode) InContainer() bool { return false }

var _ validation.RuntimeMode = metal

// read is what Talos understood of a configuration.
type read struct {
	Kinds       []string `json:"kinds,omitempty"`
	APIURL      string   `json:"api_url"`
	Events      string   `json:"events"`
	Logs        []string `json:"logs,omitempty"`
	Nameservers []string `json:"nameservers,omitempty"`
	ProviderID  any      `json:"provider_id"`
	// Error: it cannot be loaded, or is not valid, or Talos warns of it.
	Error string `json:"error"`
}

// load loads documents as Talos does from its platform, and validates them.
func load(text string) read {
	loaded, err := configloader.NewFromBytes([]byte(text))
	if err != nil {
		return read{Error: err.Error()}
	}

	return understand(loaded)
}

func understand(loaded config.Provider) read {
	for _, mode := range []mode{metal, cloud} {
		warnings, err := loaded.ValidateAsClient(mode, validation.WithStrict())
		if err != nil {
			return read{Error: fmt.Sprintf("%s: %s", mode, err)}
		}

		if len(warnings) > 0 {
			return read{Error: fmt.Sprintf("%s: %q", mode, warnings)}
		}
	}

	var out read

	for _, document := range loaded.Documents() {
		out.Kinds = append(out.Kinds, document.Kind())
	}

	if link := loaded.SideroLink(); link != nil {
		out.APIURL = link.APIUrl().String()
	}

	if events := loaded.Runtime().EventsEndpoint(); events != nil {
		out.Events = *events
	}

	for _, log := range loaded.Runtime().KmsgLogURLs() {
		out.Logs = append(out.Logs, log.String())
	}

	if resolver := loaded.NetworkResolverConfig(); resolver != nil {
		for _, server := range resolver.Resolvers() {
			out.Nameservers = append(out.Nameservers, server.Addr.String())
		}
	}

	if machine := loaded.Machine(); machine != nil {
		out.ProviderID = machine.Kubelet().ExtraConfig()["providerID"]
	}

	return out
}

type patchInput struct {
	Patches      []string `json:"patches"`
	ControlPlane bool     `json:"control_plane"`
}

// whole is a machine's configuration before our patches. Its keys take a while, so there is one for all.
var whole = sync.OnceValues(func() (map[bool]config.Provider, error) {
	input, err := generate.NewInput(
		"cluster",
		"https://127.0.0.1:6443",
		"1.34.0",
		generate.WithVersionContract(config.TalosVersion1_12),
		generate.WithInstallDisk("/dev/vda"),
	)
	if err != nil {
		return nil, err
	}

	configs := map[bool]config.Provider{}

	for controlPlane, kind := range map[bool]machine.Type{true: machine.TypeControlPlane, false: machine.TypeWorker} {
		if configs[controlPlane], err = input.Config(kind); err != nil {
			return nil, err
		}
	}

	return configs, nil
})

// patch patches a whole configuration as Omni does, and says what Talos then understands.
func patch(in patchInput) read {
	configs, err := whole()
	if err != nil {
		return read{Error: err.Error()}
	}

	var patches []configpatcher.Patch

	for _, text := range in.Patches {
		loaded, err := configpatcher.LoadPatch([]byte(text))
		if err != nil {
			return read{Error: err.Error()}
		}

		patches = append(patches, loaded)
	}

	patched, err := configpatcher.Apply(configpatcher.WithConfig(configs[in.ControlPlane]), patches)
	if err != nil {
		return read{Error: err.Error()}
	}

	text, err := patched.Bytes()
	if err != nil {
		return read{Error: err.Error()}
	}

	// As the machine would get it.
	return load(string(text))
}
