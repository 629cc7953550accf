// Command provider is a provider that upstream's own library runs, with three trivial steps: it registers a schematic, starts
// an instance on the sandbox's Oxide, and asks for a config patch.
//
// The first line of its standard input says where Omni and Oxide are. It answers each line with a line of JSON that tells what
// happened next, and ends when its input does.
package main

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/cosi-project/runtime/pkg/resource"
	"github.com/cosi-project/runtime/pkg/resource/meta"
	"github.com/cosi-project/runtime/pkg/resource/protobuf"
	"github.com/cosi-project/runtime/pkg/resource/typed"
	"github.com/cosi-project/runtime/pkg/safe"
	"github.com/cosi-project/runtime/pkg/state"
	"github.com/oxidecomputer/oxide.go/oxide"
	"github.com/siderolabs/omni/client/api/omni/specs"
	"github.com/siderolabs/omni/client/pkg/client"
	"github.com/siderolabs/omni/client/pkg/client/omni"
	"github.com/siderolabs/omni/client/pkg/infra"
	"github.com/siderolabs/omni/client/pkg/infra/provision"
	infrares "github.com/siderolabs/omni/client/pkg/omni/resources/infra"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
)

// providerID is a constant because the type of a resource is.
const providerID = "upstream"

// project is the one that the sandbox has.
const project = "talos"

// pause is how long a step waits for something that others have to do.
const pause = 100 * time.Millisecond

// Machine is the provider's record of one request. Its spec is some message of upstream's; only its first field is used.
type Machine = typed.Resource[MachineSpec, MachineExtension]

// MachineSpec has the schematic and the instance of a machine, with a space between them.
type MachineSpec = protobuf.ResourceSpec[specs.MachineSpec, *specs.MachineSpec]

// MachineExtension makes a resource of it.
type MachineExtension struct{}

// ResourceDefinition implements typed.Extension.
func (MachineExtension) ResourceDefinition() meta.ResourceDefinitionSpec {
	return meta.ResourceDefinitionSpec{
		Type:             infra.ResourceType("Machine", providerID),
		DefaultNamespace: infra.ResourceNamespace(providerID),
	}
}

// settings is the first line of the input.
type settings struct {
	OmniEndpoint string `json:"omni_endpoint"`
	OmniKey      string `json:"omni_key"`
	OxideHost    string `json:"oxide_host"`
	OxideToken   string `json:"oxide_token"`
	// Registration: the library has to learn a machine's UUID from Omni, and Omni its request from the join token.
	Registration bool `json:"registration"`
}

// event is one line of the output.
type event struct {
	Event     string `json:"event"`
	Request   string `json:"request,omitempty"`
	Schematic string `json:"schematic,omitempty"`
	Instance  string `json:"instance,omitempty"`
	Name      string `json:"name,omitempty"`
	Left      string `json:"left,omitempty"`
	Machine   string `json:"machine,omitempty"`
	Stage     string `json:"stage,omitempty"`
	Status    string `json:"status,omitempty"`
	Error     string `json:"error,omitempty"`
}

type provisioner struct {
	oxide        *oxide.Client
	omni         state.State
	events       chan event
	registration bool
}

// ProvisionSteps implements provision.Provisioner.
func (p *provisioner) ProvisionSteps() []provision.Step[*Machine] {
	return []provision.Step[*Machine]{
		provision.NewStep("schematic", p.schematic),
		provision.NewStep("instance", p.instance),
		provision.NewStep("patch", p.patch),
	}
}

func (p *provisioner) schematic(ctx context.Context, logger *zap.Logger, pctx provision.Context[*Machine]) error {
	id, err := pctx.GenerateSchematicID(
		ctx,
		logger,
		provision.WithoutConnectionParams(),
		provision.WithExtraKernelArgs("console=ttyS0"),
		provision.WithExtraExtensions("siderolabs/amd-ucode"),
	)
	if err != nil {
		return err
	}

	pctx.State.TypedSpec().Value.ManagementAddress = id
	p.events <- event{Event: "schematic", Request: pctx.GetRequestID(), Schematic: id}

	return nil
}

func (p *provisioner) instance(ctx context.Context, _ *zap.Logger, pctx provision.Context[*Machine]) error {
	name := oxide.Name(pctx.GetRequestID())

	instance, err := p.oxide.InstanceCreate(ctx, oxide.InstanceCreateParams{
		Project: oxide.NameOrId(project),
		Body: &oxide.InstanceCreate{
			Name:        name,
			Hostname:    oxide.Hostname(name),
			Description: "made by upstream's library",
			Memory:      1 << 30,
			Ncpus:       1,
			Start:       oxide.NewPointer(true),
			UserData:    base64.StdEncoding.EncodeToString([]byte(pctx.ConnectionParams.JoinConfig)),
		},
	})
	if errors.Is(err, oxide.ErrObjectAlreadyExists) {
		// An earlier pass made it, and what it wrote was lost.
		instance, err = p.oxide.InstanceView(ctx, oxide.InstanceViewParams{
			Project:  oxide.NameOrId(project),
			Instance: oxide.NameOrId(name),
		})
	}

	if err != nil {
		return provision.NewRetryError(err, pause)
	}

	if !p.registration {
		pctx.SetMachineUUID(instance.Id)
	}

	pctx.SetMachineInfraID(instance.Id)

	pctx.State.TypedSpec().Value.ManagementAddress += " " + instance.Id
	p.events <- event{Event: "instance", Request: pctx.GetRequestID(), Instance: instance.Id}

	return nil
}

func (p *provisioner) patch(ctx context.Context, _ *zap.Logger, pctx provision.Context[*Machine]) error {
	id := "upstream-" + pctx.GetRequestID()
	patch := "machine:\n  nodeLabels:\n    made-for: " + pctx.GetRequestID() + "\n"

	if p.registration {
		// Long enough for the library to compress it.
		patch += strings.Repeat("# a long patch\n", 200)
	}

	if err := pctx.CreateConfigPatch(ctx, id, []byte(patch)); err != nil {
		return err
	}

	// Omni holds the patch as soon as it knows whose it is.
	held, err := safe.StateGetByID[*infrares.ConfigPatchRequest](ctx, p.omni, id)
	if err != nil || held.Metadata().Finalizers().Empty() {
		return provision.NewRetryInterval(pause)
	}

	data, err := held.TypedSpec().Value.GetUncompressedData()
	if err != nil {
		return err
	}
	defer data.Free()

	if string(data.Data()) != patch {
		return fmt.Errorf("the patch came back as %q", data.Data())
	}

	p.events <- event{Event: "patch", Request: pctx.GetRequestID()}

	return nil
}

// Deprovision implements provision.Provisioner.
func (p *provisioner) Deprovision(ctx context.Context, _ *zap.Logger, machine *Machine, request *infrares.MachineRequest) error {
	_, id, _ := strings.Cut(machine.TypedSpec().Value.ManagementAddress, " ")

	instance, err := p.oxide.InstanceStop(ctx, oxide.InstanceStopParams{Instance: oxide.NameOrId(id)})
	if err != nil {
		return err
	}

	if instance.RunState != oxide.InstanceStateStopped {
		return provision.NewRetryInterval(pause)
	}

	if err = p.oxide.InstanceDelete(ctx, oxide.InstanceDeleteParams{Instance: oxide.NameOrId(id)}); err != nil {
		return err
	}

	left, err := p.left(ctx, request.Metadata().ID())
	if err != nil {
		return err
	}

	p.events <- event{Event: "deprovisioned", Request: request.Metadata().ID(), Instance: id, Left: left}

	return nil
}

// left says what Omni still has of a machine whose turn to be deprovisioned has come: there should be nothing.
func (p *provisioner) left(ctx context.Context, request resource.ID) (string, error) {
	var left []string

	for _, pointer := range []resource.Pointer{
		infrares.NewMachineRequestStatus(request).Metadata(),
		infrares.NewConfigPatchRequest("upstream-" + request).Metadata(),
	} {
		switch _, err := p.omni.Get(ctx, pointer); {
		case err == nil:
			left = append(left, pointer.Type())
		case !state.IsNotFoundError(err):
			return "", err
		}
	}

	return strings.Join(left, " "), nil
}

// registered waits for what the library tells Omni of the provider.
func (p *provisioner) registered(ctx context.Context) error {
	any := state.WithEventTypes(state.Created, state.Updated)

	status, err := safe.StateWatchFor[*infrares.ProviderStatus](ctx, p.omni, infrares.NewProviderStatus(providerID).Metadata(), any)
	if err != nil {
		return err
	}

	if _, err = p.omni.WatchFor(ctx, infrares.NewProviderHealthStatus(providerID).Metadata(), any); err != nil {
		return err
	}

	p.events <- event{Event: "registered", Name: status.TypedSpec().Value.Name}

	return nil
}

// watch tells what the library writes for people to see.
func (p *provisioner) watch(ctx context.Context) error {
	changes := make(chan safe.WrappedStateEvent[*infrares.MachineRequestStatus])

	if err := safe.StateWatchKind(
		ctx,
		p.omni,
		infrares.NewMachineRequestStatus("").Metadata(),
		changes,
		state.WithBootstrapContents(true),
	); err != nil {
		return err
	}

	for {
		select {
		case <-ctx.Done():
			return nil
		case change := <-changes:
			if err := change.Error(); err != nil {
				return err
			}

			if change.Type() == state.Bootstrapped {
				continue
			}

			status, err := change.Resource()
			if err != nil {
				return err
			}

			spec := status.TypedSpec().Value
			p.events <- event{
				Event:   strings.ToLower(change.Type().String()),
				Request: status.Metadata().ID(),
				Machine: spec.Id,
				Stage:   spec.Stage.String(),
				Status:  spec.Status,
			}
		}
	}
}

func (p *provisioner) run(ctx context.Context, set settings, logger *zap.Logger) error {
	var err error

	if p.oxide, err = oxide.NewClient(oxide.WithHost(set.OxideHost), oxide.WithToken(set.OxideToken)); err != nil {
		return err
	}

	// Another client than the library's, to look with.
	looker, err := client.New(
		set.OmniEndpoint,
		client.WithServiceAccount(set.OmniKey),
		client.WithOmniClientOptions(omni.WithProviderID(providerID)),
	)
	if err != nil {
		return err
	}
	defer looker.Close() //nolint:errcheck

	p.omni = looker.Omni().State()

	provider, err := infra.NewProvider(providerID, p, infra.ProviderConfig{
		Name:        "Upstream",
		Description: "Upstream's library with three trivial steps.",
		Schema:      "{}",
	})
	if err != nil {
		return err
	}

	options := []infra.Option{
		infra.WithOmniEndpoint(set.OmniEndpoint),
		infra.WithClientOptions(client.WithServiceAccount(set.OmniKey)),
		infra.WithConcurrency(4),
		infra.WithHealthCheckInterval(time.Second),
	}
	if set.Registration {
		options = append(options, infra.WithEncodeRequestIDsIntoTokens())
	}

	all, ctx := errgroup.WithContext(ctx)

	all.Go(func() error { return p.registered(ctx) })
	all.Go(func() error { return p.watch(ctx) })
	all.Go(func() error { return provider.Run(ctx, logger, options...) })

	return all.Wait()
}

func work() error {
	logger, err := zap.NewDevelopment()
	if err != nil {
		return err
	}

	input := bufio.NewScanner(os.Stdin)
	input.Buffer(nil, 1<<20)

	if !input.Scan() {
		return input.Err()
	}

	var set settings
	if err = json.Unmarshal(input.Bytes(), &set); err != nil {
		return err
	}

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()

	p := &provisioner{events: make(chan event, 1000), registration: set.Registration}

	go func() {
		if err := p.run(ctx, set, logger); err != nil {
			p.events <- event{Event: "failed", Error: err.Error()}
		}
	}()

	asked := make(chan struct{}, 1)
	asked <- struct{}{}

	go func() {
		defer close(asked)

		for input.Scan() {
			asked <- struct{}{}
		}
	}()

	output := json.NewEncoder(os.Stdout)

	// Nothing is told unasked.
	var next <-chan event

	for {
		select {
		case _, more := <-asked:
			if !more {
				return input.Err()
			}

			next = p.events
		case what := <-next:
			if err = output.Encode(what); err != nil {
				return err
			}

			next = nil
		}
	}
}

func main() {
	if err := work(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
