package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/cosi-project/runtime/api/v1alpha1"
	"github.com/cosi-project/runtime/pkg/resource"
	"github.com/cosi-project/runtime/pkg/resource/protobuf"
	"github.com/cosi-project/runtime/pkg/state"
	"github.com/cosi-project/runtime/pkg/state/impl/inmem"
	"github.com/cosi-project/runtime/pkg/state/impl/namespaced"
	"github.com/cosi-project/runtime/pkg/state/impl/store"
	"github.com/cosi-project/runtime/pkg/state/impl/store/bolt"
	stateserver "github.com/cosi-project/runtime/pkg/state/protobuf/server"
	"github.com/cosi-project/runtime/pkg/state/registry"
	"go.etcd.io/bbolt"
	"google.golang.org/grpc"

	// Each registers its types.
	_ "github.com/siderolabs/omni/client/pkg/omni/resources/infra"
	_ "github.com/siderolabs/omni/client/pkg/omni/resources/omni"
	omniregistry "github.com/siderolabs/omni/client/pkg/omni/resources/registry"
	_ "github.com/siderolabs/omni/client/pkg/omni/resources/siderolink"
	_ "github.com/siderolabs/omni/client/pkg/omni/resources/virtual"
)

// maxMessage is Omni's limit for what it receives.
const maxMessage = 32 << 20

// server is the state, and who serves it right now.
type server struct {
	state state.State
	grpc  *grpc.Server
	http  *http.Server
	mu    sync.Mutex
}

// newServer opens the state; nobody listens yet.
func newServer(ctx context.Context, keys *keys, file string, history int) (*server, error) {
	options, err := stateOptions(file, history)
	if err != nil {
		return nil, err
	}

	resources := state.WrapCore(namespaced.NewState(func(ns resource.Namespace) state.CoreState {
		return inmem.NewStateWithOptions(options(ns)...)(ns)
	}))

	definitions := registry.NewResourceRegistry(resources)

	if err = known(definitions.RegisterDefault(ctx)); err != nil {
		return nil, err
	}

	for _, definition := range omniregistry.Resources {
		if err = known(definitions.Register(ctx, definition)); err != nil {
			return nil, err
		}
	}

	server := &server{
		state: resources,
		grpc: grpc.NewServer(
			grpc.MaxRecvMsgSize(maxMessage),
			grpc.UnaryInterceptor(keys.unary),
			grpc.StreamInterceptor(keys.stream),
		),
	}

	v1alpha1.RegisterStateServer(server.grpc, stateserver.NewState(resources))

	return server, nil
}

// known forgives what an earlier process has registered.
func known(err error) error {
	if state.IsConflictError(err) {
		return nil
	}

	return err
}

// stateOptions keep the resources in a file: the next process has them all, and none of the bookmarks.
func stateOptions(file string, history int) (func(ns resource.Namespace) []inmem.StateOption, error) {
	var options []inmem.StateOption

	if history > 0 {
		options = append(options,
			inmem.WithHistoryInitialCapacity(history),
			inmem.WithHistoryMaxCapacity(history),
			inmem.WithHistoryGap(0),
		)
	}

	if file == "" {
		return func(resource.Namespace) []inmem.StateOption { return options }, nil
	}

	backing, err := bolt.NewBackingStore(func() (*bbolt.DB, error) {
		// A killed process is all that this file has to outlive, so nothing waits for the disk.
		return bbolt.Open(file, 0o600, &bbolt.Options{NoSync: true, NoFreelistSync: true, Timeout: 10 * time.Second})
	}, store.ProtobufMarshaler{})
	if err != nil {
		return nil, err
	}

	return func(ns resource.Namespace) []inmem.StateOption {
		return append([]inmem.StateOption{inmem.WithBackingStore(backing.WithNamespace(ns))}, options...)
	}, nil
}

// listen serves as Omni does: gRPC through net/http, in clear text.
func (server *server) listen(address string) (string, error) {
	server.mu.Lock()
	defer server.mu.Unlock()

	if server.http != nil {
		return "", errors.New("it listens already")
	}

	if address == "" {
		address = "127.0.0.1:0"
	}

	listener, err := net.Listen("tcp", address)
	if err != nil {
		return "", err
	}

	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)

	server.http = &http.Server{Handler: server.grpc, Protocols: protocols}

	go server.http.Serve(listener) //nolint:errcheck

	return listener.Addr().String(), nil
}

// hangUp breaks all connections and refuses new ones; the state lives on.
func (server *server) hangUp() error {
	server.mu.Lock()
	defer server.mu.Unlock()

	if server.http == nil {
		return errors.New("it does not listen")
	}

	err := server.http.Close()
	server.http = nil

	return err
}

// resourceText is a resource in a command.
type resourceText struct {
	Namespace   string            `json:"namespace"`
	Type        string            `json:"type"`
	ID          string            `json:"id"`
	Owner       string            `json:"owner"`
	Phase       string            `json:"phase"`
	Finalizers  []string          `json:"finalizers"`
	Labels      map[string]string `json:"labels"`
	Annotations map[string]string `json:"annotations"`

	// The spec: as it is on the wire, or as the fields of upstream's own type.
	Spec   []byte          `json:"spec"`
	Fields json.RawMessage `json:"fields"`
}

func (text resourceText) pointer() resource.Metadata {
	return resource.NewMetadata(text.Namespace, text.Type, text.ID, resource.VersionUndefined)
}

// parse makes a resource of it, of upstream's own type where upstream has one.
func (text resourceText) parse() (resource.Resource, error) {
	phase := text.Phase
	if phase == "" {
		phase = resource.PhaseRunning.String()
	}

	opaque, err := protobuf.Unmarshal(&v1alpha1.Resource{
		Metadata: &v1alpha1.Metadata{
			Namespace:   text.Namespace,
			Type:        text.Type,
			Id:          text.ID,
			Version:     resource.VersionUndefined.String(),
			Owner:       text.Owner,
			Phase:       phase,
			Finalizers:  text.Finalizers,
			Labels:      text.Labels,
			Annotations: text.Annotations,
		},
		Spec: &v1alpha1.Spec{ProtoSpec: text.Spec},
	})
	if err != nil {
		return nil, err
	}

	parsed, err := protobuf.UnmarshalResource(opaque)
	if err != nil {
		return nil, err
	}

	if text.Fields != nil {
		spec, ok := parsed.Spec().(json.Unmarshaler)
		if !ok {
			return nil, fmt.Errorf("upstream has no type %s", text.Type)
		}

		if err = spec.UnmarshalJSON(text.Fields); err != nil {
			return nil, err
		}
	}

	return parsed, nil
}

// put creates the resource, or replaces the one there is.
func (server *server) put(ctx context.Context, text resourceText) error {
	parsed, err := text.parse()
	if err != nil {
		return err
	}

	current, err := server.state.Get(ctx, text.pointer())
	if state.IsNotFoundError(err) {
		return server.state.Create(ctx, parsed, state.WithCreateOwner(text.Owner))
	}

	if err != nil {
		return err
	}

	parsed.Metadata().SetVersion(current.Metadata().Version())

	return server.state.Update(ctx, parsed,
		state.WithUpdateOwner(current.Metadata().Owner()),
		state.WithExpectedPhaseAny(),
	)
}

// destroy ends a resource whatever holds it.
func (server *server) destroy(ctx context.Context, text resourceText) error {
	current, err := server.state.Get(ctx, text.pointer())
	if err != nil {
		return err
	}

	owner := current.Metadata().Owner()

	if held := *current.Metadata().Finalizers(); len(held) > 0 {
		if err = server.state.RemoveFinalizer(ctx, current.Metadata(), held...); err != nil {
			return err
		}
	}

	return server.state.Destroy(ctx, current.Metadata(), state.WithDestroyOwner(owner))
}
