package main

import (
	"github.com/siderolabs/omni/client/pkg/jointoken"
	"github.com/siderolabs/omni/client/pkg/omni/resources/infra"
	"github.com/siderolabs/omni/client/pkg/siderolink"
)

type tokenInput struct {
	Token   string            `json:"token"`
	Version string            `json:"version"`
	Extra   map[string]string `json:"extra"`
}

type tokenAnswer struct {
	Token string `json:"token"`
	Error string `json:"error"`
}

// token encodes one, and makes sure that it is its own.
func token(in tokenInput) tokenAnswer {
	made, err := jointoken.NewWithExtraData(in.Token, in.Version, in.Extra)
	if err != nil {
		return tokenAnswer{Error: err.Error()}
	}

	encoded, err := made.Encode()

	return tokenAnswer{Token: encoded, Error: text(err)}
}

type joinInput struct {
	URL      string  `json:"url"`
	Token    string  `json:"token"`
	Version  string  `json:"version"`
	Provider string  `json:"provider"`
	Request  *string `json:"request"`
	Tunnel   bool    `json:"tunnel"`
	Events   int     `json:"events"`
	Logs     int     `json:"logs"`
}

type joinAnswer struct {
	KernelArgs []string `json:"kernel_args,omitempty"`
	Documents  string   `json:"documents"`
	Error      string   `json:"error"`
}

// join renders what the library gives to a provider's steps.
func join(in joinInput) joinAnswer {
	options := []siderolink.JoinConfigOption{
		siderolink.WithMachineAPIURL(in.URL),
		siderolink.WithJoinToken(in.Token),
		siderolink.WithJoinTokenVersion(in.Version),
		siderolink.WithGRPCTunnel(in.Tunnel),
		siderolink.WithEventSinkPort(in.Events),
		siderolink.WithLogServerPort(in.Logs),
		siderolink.WithProvider(infra.NewProvider(in.Provider)),
	}
	if in.Request != nil {
		options = append(options, siderolink.WithMachineRequestID(*in.Request))
	}

	made, err := siderolink.NewJoinOptions(options...)
	if err != nil {
		return joinAnswer{Error: err.Error()}
	}

	documents, err := made.RenderJoinConfig()
	if err != nil {
		return joinAnswer{Error: err.Error()}
	}

	return joinAnswer{KernelArgs: made.GetKernelArgs(), Documents: string(documents)}
}
