package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"strings"

	"github.com/oxidecomputer/oxide.go/oxide"
)

// project is the one that the sandbox has from the start, with a VPC and a subnet of the same name.
const (
	project = oxide.NameOrId("talos")
	network = oxide.Name("default")
	gib     = oxide.ByteCount(1 << 30)
	nobody  = oxide.NameOrId("0b7c3b0e-5f3c-4a6b-9d1a-1f1b9b0e7a11")
)

func user(ctx context.Context, s *session) {
	equal(must(s.Ping(ctx)).Status, oxide.PingStatusOk)
	isTrue(must(s.CurrentUserView(ctx)).DisplayName != "", "the user has a name")
	isTrue(must(s.UtilizationView(ctx)).Capacity.Memory > gib, "there is room")
}

func projects(ctx context.Context, s *session) {
	body := &oxide.ProjectCreate{Name: "other", Description: "made by the vendor's client"}

	made := must(s.ProjectCreate(ctx, oxide.ProjectCreateParams{Body: body}))
	equal(made.Description, body.Description)
	refused(s.ProjectCreate(ctx, oxide.ProjectCreateParams{Body: body})).
		with(oxide.ErrHTTP400, oxide.ErrObjectAlreadyExists, `already exists: project "other"`)

	for _, pick := range []oxide.NameOrId{"other", oxide.NameOrId(made.Id)} {
		equal(must(s.ProjectView(ctx, oxide.ProjectViewParams{Project: pick})).Id, made.Id)
	}

	refused(s.ProjectView(ctx, oxide.ProjectViewParams{Project: "nowhere"})).
		with(oxide.ErrHTTP404, oxide.ErrObjectNotFound, `not found: project with name "nowhere"`)
	refused(s.ProjectView(ctx, oxide.ProjectViewParams{Project: nobody})).
		with(oxide.ErrHTTP404, oxide.ErrObjectNotFound, "not found: project with id")

	all := must(s.ProjectList(ctx, oxide.ProjectListParams{})).Items
	has(all, func(it oxide.Project) oxide.Name { return it.Name }, "other")
	has(all, func(it oxide.Project) oxide.Name { return it.Name }, string(project))

	// A project comes with a network.
	vpcs := must(s.VpcList(ctx, oxide.VpcListParams{Project: "other"})).Items
	equal(names(vpcs, func(it oxide.Vpc) oxide.Name { return it.Name }), []string{"default"})

	vpc := must(s.VpcView(ctx, oxide.VpcViewParams{Project: "other", Vpc: "default"}))
	equal(must(s.VpcView(ctx, oxide.VpcViewParams{Vpc: oxide.NameOrId(vpc.Id)})), vpc)
	refused(s.VpcView(ctx, oxide.VpcViewParams{Vpc: "default"})).
		with(oxide.ErrHTTP400, oxide.ErrInvalidRequest, "project should be specified")
	refused(s.VpcView(ctx, oxide.VpcViewParams{Project: "other", Vpc: oxide.NameOrId(vpc.Id)})).
		with(oxide.ErrHTTP400, oxide.ErrInvalidRequest, "project should not be specified")
	refused(s.VpcView(ctx, oxide.VpcViewParams{Project: "other", Vpc: "none"})).
		with(oxide.ErrHTTP404, oxide.ErrObjectNotFound, "vpc")

	subnets := must(s.VpcSubnetList(ctx, oxide.VpcSubnetListParams{Project: "other", Vpc: "default"})).Items
	equal(len(subnets), 1)
	equal(subnets[0].VpcId, vpc.Id)

	for _, params := range []oxide.VpcSubnetViewParams{
		{Project: "other", Vpc: "default", Subnet: "default"},
		{Vpc: oxide.NameOrId(vpc.Id), Subnet: "default"},
		{Subnet: oxide.NameOrId(subnets[0].Id)},
	} {
		equal(must(s.VpcSubnetView(ctx, params)).Id, subnets[0].Id)
	}

	group := &oxide.AntiAffinityGroupCreate{
		Name:          "spread",
		Description:   "apart",
		FailureDomain: oxide.FailureDomainSled,
		Policy:        oxide.AffinityPolicyAllow,
	}
	created := must(s.AntiAffinityGroupCreate(ctx, oxide.AntiAffinityGroupCreateParams{Project: "other", Body: group}))
	equal(must(s.AntiAffinityGroupView(ctx, oxide.AntiAffinityGroupViewParams{
		Project:           "other",
		AntiAffinityGroup: "spread",
	})), created)
	equal(len(must(s.AntiAffinityGroupList(ctx, oxide.AntiAffinityGroupListParams{Project: "other"})).Items), 1)
	refused(s.AntiAffinityGroupCreate(ctx, oxide.AntiAffinityGroupCreateParams{Project: "other", Body: group})).
		with(oxide.ErrHTTP400, oxide.ErrObjectAlreadyExists, "anti-affinity-group")

	equal(len(must(s.FloatingIpList(ctx, oxide.FloatingIpListParams{Project: "other"})).Items), 0)
	refused(s.FloatingIpView(ctx, oxide.FloatingIpViewParams{Project: "other", FloatingIp: "none"})).
		with(oxide.ErrHTTP404, oxide.ErrObjectNotFound, "floating-ip")
}

func blank(name string, size oxide.ByteCount) *oxide.DiskCreate {
	return &oxide.DiskCreate{
		Name:        oxide.Name(name),
		Description: "blank",
		Size:        size,
		DiskBackend: oxide.DiskBackend{Value: &oxide.DiskBackendDistributed{
			DiskSource: oxide.DiskSource{Value: &oxide.DiskSourceBlank{BlockSize: 4096}},
		}},
	}
}

func disks(ctx context.Context, s *session) {
	create := func(body *oxide.DiskCreate) oxide.DiskCreateParams {
		return oxide.DiskCreateParams{Project: project, Body: body}
	}

	made := must(s.DiskCreate(ctx, create(blank("data", gib))))
	equal(made.State.State(), oxide.DiskStateStateDetached)
	equal(made.DiskType, oxide.DiskTypeDistributed)
	equal(made.Size, gib)

	view := oxide.DiskViewParams{Project: project, Disk: "data"}
	equal(must(s.DiskView(ctx, view)), made)
	equal(must(s.DiskView(ctx, oxide.DiskViewParams{Disk: oxide.NameOrId(made.Id)})), made)

	local := must(s.DiskCreate(ctx, create(&oxide.DiskCreate{
		Name:        "local",
		Description: "on one sled",
		Size:        2 * gib,
		DiskBackend: oxide.DiskBackend{Value: &oxide.DiskBackendLocal{}},
	})))
	equal(local.DiskType, oxide.DiskTypeLocal)
	equal(
		names(must(s.DiskList(ctx, oxide.DiskListParams{Project: project})).Items, func(it oxide.Disk) oxide.Name { return it.Name }),
		[]string{"data", "local"},
	)

	refused(s.DiskCreate(ctx, create(blank("data", gib)))).
		with(oxide.ErrHTTP400, oxide.ErrObjectAlreadyExists, `already exists: disk "data"`)
	refused(s.DiskCreate(ctx, create(blank("odd", gib+4096)))).
		with(oxide.ErrHTTP400, oxide.ErrInvalidValue, "multiple of 1 GiB")
	refused(s.DiskCreate(ctx, create(blank("big", 1024*gib)))).
		with(oxide.ErrHTTP400, oxide.ErrInvalidValue, "1023 GiB")
	refused(s.DiskCreate(ctx, create(blank("Capital", gib)))).
		with(oxide.ErrHTTP400, nil, "lowercase")
	refused(s.DiskCreate(ctx, oxide.DiskCreateParams{Project: "nowhere", Body: blank("data", gib)})).
		with(oxide.ErrHTTP404, oxide.ErrObjectNotFound, "project")

	snapshot := &oxide.SnapshotCreate{Name: "before", Description: "then", Disk: "data"}
	taken := must(s.SnapshotCreate(ctx, oxide.SnapshotCreateParams{Project: project, Body: snapshot}))
	equal(taken.State, oxide.SnapshotStateReady)
	equal(taken.DiskId, made.Id)
	equal(taken.Size, made.Size)
	refused(s.SnapshotCreate(ctx, oxide.SnapshotCreateParams{Project: project, Body: snapshot})).
		with(oxide.ErrHTTP400, oxide.ErrObjectAlreadyExists, "snapshot")

	equal(must(s.SnapshotView(ctx, oxide.SnapshotViewParams{Project: project, Snapshot: "before"})), taken)
	equal(len(must(s.SnapshotList(ctx, oxide.SnapshotListParams{Project: project})).Items), 1)

	// A disk of a snapshot is at least as large.
	of := func(size oxide.ByteCount) oxide.DiskCreateParams {
		body := blank("again", size)
		body.DiskBackend.Value = &oxide.DiskBackendDistributed{
			DiskSource: oxide.DiskSource{Value: &oxide.DiskSourceSnapshot{SnapshotId: taken.Id}},
		}

		return create(body)
	}
	equal(must(s.DiskCreate(ctx, of(2*gib))).SnapshotId, taken.Id)

	ok(s.SnapshotDelete(ctx, oxide.SnapshotDeleteParams{Snapshot: oxide.NameOrId(taken.Id)}))
	refused(s.SnapshotView(ctx, oxide.SnapshotViewParams{Snapshot: oxide.NameOrId(taken.Id)})).
		with(oxide.ErrHTTP404, oxide.ErrObjectNotFound, "snapshot")

	for _, name := range []oxide.NameOrId{"data", "local", "again"} {
		ok(s.DiskDelete(ctx, oxide.DiskDeleteParams{Project: project, Disk: name}))
	}

	refused(s.DiskView(ctx, view)).with(oxide.ErrHTTP404, oxide.ErrObjectNotFound, "disk")
	refusedAll(s.DiskDelete(ctx, oxide.DiskDeleteParams{Project: project, Disk: "data"})).
		with(oxide.ErrHTTP404, oxide.ErrObjectNotFound, "disk")
}

// imports takes an image in as the Go provider does: a disk, bytes, a snapshot, an image.
func imports(ctx context.Context, s *session) {
	body := blank("image", gib)
	body.DiskBackend.Value = &oxide.DiskBackendDistributed{
		DiskSource: oxide.DiskSource{Value: &oxide.DiskSourceImportingBlocks{BlockSize: 512}},
	}
	disk := must(s.DiskCreate(ctx, oxide.DiskCreateParams{Project: project, Body: body}))
	equal(disk.State.State(), oxide.DiskStateStateImportReady)

	id := oxide.NameOrId(disk.Id)
	state := func(wanted oxide.DiskStateState) {
		equal(must(s.DiskView(ctx, oxide.DiskViewParams{Disk: id})).State.State(), wanted)
	}
	write := func(offset uint64, data []byte) error {
		return s.DiskBulkWriteImport(ctx, oxide.DiskBulkWriteImportParams{
			Disk: id,
			Body: &oxide.ImportBlocksBulkWrite{
				Base64EncodedData: base64.StdEncoding.EncodeToString(data),
				Offset:            &offset,
			},
		})
	}
	chunk := bytes.Repeat([]byte("talos..."), 512*1024/8)

	refusedAll(write(0, chunk)).with(oxide.ErrHTTP400, oxide.ErrInvalidRequest, "import")
	ok(s.DiskBulkWriteImportStart(ctx, oxide.DiskBulkWriteImportStartParams{Disk: id}))
	state(oxide.DiskStateStateImportingFromBulkWrites)
	refusedAll(s.DiskBulkWriteImportStart(ctx, oxide.DiskBulkWriteImportStartParams{Disk: id})).
		with(oxide.ErrHTTP400, oxide.ErrInvalidRequest, "import")

	ok(write(0, chunk))
	ok(write(512*1024, chunk[:512]))
	// The same bytes again change nothing.
	ok(write(0, chunk))
	refusedAll(write(1, chunk[:512])).with(oxide.ErrHTTP400, oxide.ErrInvalidRequest, "block size")
	refusedAll(write(0, chunk[:511])).with(oxide.ErrHTTP400, oxide.ErrInvalidRequest, "block size")
	refusedAll(write(0, append(chunk, chunk[:512]...))).with(oxide.ErrHTTP400, oxide.ErrInvalidRequest, "chunk size")
	refusedAll(write(uint64(gib), chunk[:512])).with(oxide.ErrHTTP400, oxide.ErrInvalidRequest, "end")

	refusedAll(s.DiskDelete(ctx, oxide.DiskDeleteParams{Disk: id})).
		with(oxide.ErrHTTP400, oxide.ErrInvalidRequest, "cannot be deleted")
	refusedAll(s.DiskFinalizeImport(ctx, oxide.DiskFinalizeImportParams{Disk: id, Body: &oxide.FinalizeDisk{}})).
		with(oxide.ErrHTTP400, oxide.ErrInvalidRequest, "finalize")
	ok(s.DiskBulkWriteImportStop(ctx, oxide.DiskBulkWriteImportStopParams{Disk: id}))
	state(oxide.DiskStateStateImportReady)

	ok(s.DiskFinalizeImport(ctx, oxide.DiskFinalizeImportParams{
		Disk: id,
		Body: &oxide.FinalizeDisk{SnapshotName: "image"},
	}))
	state(oxide.DiskStateStateDetached)

	snapshot := must(s.SnapshotView(ctx, oxide.SnapshotViewParams{Project: project, Snapshot: "image"}))
	equal(snapshot.State, oxide.SnapshotStateReady)
	equal(snapshot.DiskId, disk.Id)

	create := oxide.ImageCreateParams{
		Project: project,
		Body: &oxide.ImageCreate{
			Name:        "talos",
			Description: "imported",
			Os:          "talos",
			Version:     "1.12.0",
			Source:      oxide.ImageSource{Value: &oxide.ImageSourceSnapshot{Id: snapshot.Id}},
		},
	}
	image := must(s.ImageCreate(ctx, create))
	equal(image.Size, disk.Size)
	equal(image.BlockSize, oxide.BlockSize(512))
	refused(s.ImageCreate(ctx, create)).with(oxide.ErrHTTP400, oxide.ErrObjectAlreadyExists, "image")

	ofProject := oxide.ImageViewParams{Project: project, Image: "talos"}
	ofSilo := oxide.ImageViewParams{Image: "talos"}
	equal(must(s.ImageView(ctx, ofProject)), image)
	equal(must(s.ImageView(ctx, oxide.ImageViewParams{Image: oxide.NameOrId(image.Id)})), image)
	equal(len(must(s.ImageList(ctx, oxide.ImageListParams{Project: project})).Items), 1)
	refused(s.ImageView(ctx, ofSilo)).with(oxide.ErrHTTP404, oxide.ErrObjectNotFound, "image")

	// Disk and snapshot are no longer needed.
	ok(s.SnapshotDelete(ctx, oxide.SnapshotDeleteParams{Project: project, Snapshot: "image"}))
	ok(s.DiskDelete(ctx, oxide.DiskDeleteParams{Disk: id}))

	of := blank("boot", gib)
	of.DiskBackend.Value = &oxide.DiskBackendDistributed{
		DiskSource: oxide.DiskSource{Value: &oxide.DiskSourceImage{ImageId: image.Id, ReadOnly: oxide.NewPointer(false)}},
	}
	equal(must(s.DiskCreate(ctx, oxide.DiskCreateParams{Project: project, Body: of})).ImageId, image.Id)
	ok(s.DiskDelete(ctx, oxide.DiskDeleteParams{Project: project, Disk: "boot"}))

	equal(must(s.ImagePromote(ctx, oxide.ImagePromoteParams{Project: project, Image: "talos"})).ProjectId, "")
	equal(must(s.ImageView(ctx, ofSilo)).Id, image.Id)
	refused(s.ImageView(ctx, ofProject)).with(oxide.ErrHTTP404, oxide.ErrObjectNotFound, "image")
	refused(s.ImagePromote(ctx, oxide.ImagePromoteParams{Image: oxide.NameOrId(image.Id)})).
		with(oxide.ErrHTTP400, oxide.ErrInvalidRequest, "promote")
	has(must(s.ImageList(ctx, oxide.ImageListParams{})).Items, func(it oxide.Image) oxide.Name { return it.Name }, "talos")
	ok(s.ImageDelete(ctx, oxide.ImageDeleteParams{Image: "talos"}))
	refused(s.ImageView(ctx, ofSilo)).with(oxide.ErrHTTP404, oxide.ErrObjectNotFound, "image")
}

// machine is an instance with some of everything.
func machine(name string) *oxide.InstanceCreate {
	attach := func(name string) oxide.InstanceDiskAttachment {
		disk := blank(name, gib)

		return oxide.InstanceDiskAttachment{Value: &oxide.InstanceDiskAttachmentCreate{
			Name:        disk.Name,
			Description: disk.Description,
			Size:        disk.Size,
			DiskBackend: disk.DiskBackend,
		}}
	}

	return &oxide.InstanceCreate{
		Name:              oxide.Name(name),
		Hostname:          oxide.Hostname(name),
		Description:       "made by the vendor's client",
		Memory:            2 * gib,
		Ncpus:             2,
		BootDisk:          attach(name),
		Disks:             []oxide.InstanceDiskAttachment{attach("data-" + name)},
		AutoRestartPolicy: oxide.InstanceAutoRestartPolicyNever,
		CpuPlatform:       oxide.InstanceCpuPlatformAmdMilan,
		UserData:          base64.StdEncoding.EncodeToString([]byte("machine: {}\n")),
		Start:             oxide.NewPointer(false),
		SshPublicKeys:     []oxide.NameOrId{},
		ExternalIps: []oxide.ExternalIpCreate{{Value: &oxide.ExternalIpCreateEphemeral{
			PoolSelector: oxide.PoolSelector{Value: &oxide.PoolSelectorAuto{IpVersion: oxide.IpVersionV4}},
		}}},
		NetworkInterfaces: oxide.InstanceNetworkInterfaceAttachment{Value: &oxide.InstanceNetworkInterfaceAttachmentCreate{
			Params: []oxide.InstanceNetworkInterfaceCreate{{
				Name:        "nic",
				Description: "primary",
				VpcName:     network,
				SubnetName:  network,
				IpConfig: oxide.PrivateIpStackCreate{Value: &oxide.PrivateIpStackCreateV4{
					Value: oxide.PrivateIpv4StackCreate{
						Ip: oxide.Ipv4Assignment{Value: &oxide.Ipv4AssignmentExplicit{Value: "172.30.0.77"}},
					},
				}},
			}},
		}},
	}
}

func instances(ctx context.Context, s *session) {
	create := func(body *oxide.InstanceCreate) oxide.InstanceCreateParams {
		return oxide.InstanceCreateParams{Project: project, Body: body}
	}
	byName := func(it oxide.Disk) oxide.Name { return it.Name }

	made := must(s.InstanceCreate(ctx, create(machine("web"))))
	equal(made.RunState, oxide.InstanceStateStopped)
	equal(made.AutoRestartPolicy, oxide.InstanceAutoRestartPolicyNever)
	isTrue(made.BootDiskId != "", "there is a boot disk")
	refused(s.InstanceCreate(ctx, create(machine("web")))).
		with(oxide.ErrHTTP400, oxide.ErrObjectAlreadyExists, `already exists: instance "web"`)

	id := oxide.NameOrId(made.Id)
	view := func() oxide.InstanceState {
		return must(s.InstanceView(ctx, oxide.InstanceViewParams{Instance: id})).RunState
	}
	becomes := func(wanted oxide.InstanceState) {
		until(view, func(seen oxide.InstanceState) bool { return seen == wanted })
	}

	equal(must(s.InstanceView(ctx, oxide.InstanceViewParams{Project: project, Instance: "web"})).Id, made.Id)

	attached := must(s.InstanceDiskList(ctx, oxide.InstanceDiskListParams{Instance: id})).Items
	equal(names(attached, byName), []string{"data-web", "web"})

	for _, disk := range attached {
		held, isAttached := disk.State.AsAttached()
		isTrue(isAttached, "the disk is attached")
		equal(held.Instance, made.Id)
	}

	nics := must(s.InstanceNetworkInterfaceList(ctx, oxide.InstanceNetworkInterfaceListParams{Instance: id})).Items
	equal(len(nics), 1)
	equal(*nics[0].Primary, true)

	stack, isV4 := nics[0].IpStack.Value.(*oxide.PrivateIpStackV4)
	isTrue(isV4, "the interface has an IPv4 address alone")
	equal(stack.Value.Ip, "172.30.0.77")

	ips := must(s.InstanceExternalIpList(ctx, oxide.InstanceExternalIpListParams{Instance: id})).Items
	equal(kinds(ips), []string{"snat", "ephemeral"})

	reboot := oxide.InstanceRebootParams{Instance: id}
	start := oxide.InstanceStartParams{Instance: id}
	stop := oxide.InstanceStopParams{Instance: id}
	end := oxide.InstanceDeleteParams{Instance: id}

	console := func(fromStart, mostRecent, maxBytes *uint64) oxide.InstanceSerialConsoleParams {
		return oxide.InstanceSerialConsoleParams{Instance: id, FromStart: fromStart, MostRecent: mostRecent, MaxBytes: maxBytes}
	}
	bytes := func(n uint64) *uint64 { return &n }

	refused(s.InstanceReboot(ctx, reboot)).with(oxide.ErrHTTP400, oxide.ErrInvalidRequest, "stopped")
	refused(s.InstanceSerialConsole(ctx, console(nil, bytes(100), nil))).
		with(oxide.ErrHTTP400, oxide.ErrInvalidRequest, "no active serial console")
	equal(must(s.InstanceStart(ctx, start)).RunState, oxide.InstanceStateStarting)
	becomes(oxide.InstanceStateRunning)
	// Again is no error.
	equal(must(s.InstanceStart(ctx, start)).RunState, oxide.InstanceStateRunning)

	whole := must(s.InstanceSerialConsole(ctx, console(bytes(0), nil, nil)))
	length := *whole.LastByteOffset
	isTrue(length > 10, "the firmware said something")
	equal(uint64(len(whole.Data)), length)
	// More than there is means all of it.
	equal(must(s.InstanceSerialConsole(ctx, console(nil, bytes(1<<20), bytes(1<<20)))), whole)

	end4 := must(s.InstanceSerialConsole(ctx, console(nil, bytes(4), nil)))
	equal(end4.Data, whole.Data[length-4:])
	equal(*end4.LastByteOffset, length)

	middle := must(s.InstanceSerialConsole(ctx, console(bytes(2), nil, bytes(3))))
	equal(middle.Data, whole.Data[2:5])
	equal(*middle.LastByteOffset, uint64(5))
	equal(len(must(s.InstanceSerialConsole(ctx, console(bytes(length+7), nil, nil))).Data), 0)
	refused(s.InstanceSerialConsole(ctx, console(bytes(0), bytes(0), nil))).with(oxide.ErrHTTP500, oxide.ErrInternalError, "")
	refused(s.InstanceSerialConsole(ctx, console(nil, nil, nil))).with(oxide.ErrHTTP500, oxide.ErrInternalError, "")

	equal(must(s.InstanceReboot(ctx, reboot)).RunState, oxide.InstanceStateRebooting)
	becomes(oxide.InstanceStateRunning)

	resize := oxide.InstanceUpdateParams{Instance: id, Body: &oxide.InstanceUpdate{
		AutoRestartPolicy: oxide.NewPointer(oxide.InstanceAutoRestartPolicyBestEffort),
		BootDisk:          oxide.NewPointer(oxide.NameOrId(made.BootDiskId)),
		CpuPlatform:       oxide.NewPointer(oxide.InstanceCpuPlatformAmdMilan),
		EnableJumboFrames: oxide.NewPointer(false),
		Memory:            4 * gib,
		Ncpus:             4,
	}}
	refused(s.InstanceUpdate(ctx, resize)).with(oxide.ErrHTTP409, oxide.ErrConflict, "stopped")
	refusedAll(s.InstanceDelete(ctx, end)).with(oxide.ErrHTTP400, oxide.ErrInvalidRequest, "running")
	refusedAll(s.DiskDelete(ctx, oxide.DiskDeleteParams{Project: project, Disk: "web"})).
		with(oxide.ErrHTTP400, oxide.ErrInvalidRequest, "attached")

	equal(must(s.InstanceStop(ctx, stop)).RunState, oxide.InstanceStateStopping)
	refused(s.InstanceStart(ctx, start)).with(oxide.ErrHTTP409, oxide.ErrConflict, "stopping")
	becomes(oxide.InstanceStateStopped)
	equal(must(s.InstanceStop(ctx, stop)).RunState, oxide.InstanceStateStopped)
	equal(must(s.InstanceUpdate(ctx, resize)).Ncpus, oxide.InstanceCpuCount(4))

	ok(s.InstanceDelete(ctx, end))
	refused(s.InstanceView(ctx, oxide.InstanceViewParams{Instance: id})).
		with(oxide.ErrHTTP404, oxide.ErrObjectNotFound, "instance")
	refusedAll(s.InstanceDelete(ctx, end)).with(oxide.ErrHTTP404, oxide.ErrObjectNotFound, "instance")

	// Its disks stay, and may be another's.
	left := must(s.DiskList(ctx, oxide.DiskListParams{Project: project})).Items
	equal(names(left, byName), []string{"data-web", "web"})
	equal(left[0].State.State(), oxide.DiskStateStateDetached)

	heir := machine("heir")
	heir.BootDisk.Value = &oxide.InstanceDiskAttachmentAttach{Name: "web"}
	heir.Disks = nil
	heir.ExternalIps = nil
	heir.NetworkInterfaces.Value = &oxide.InstanceNetworkInterfaceAttachmentDefaultDualStack{}
	heir.Start = nil
	// What says nothing of it is started.
	must(s.InstanceCreate(ctx, create(heir)))

	heirs := must(s.InstanceList(ctx, oxide.InstanceListParams{Project: project})).Items
	equal(names(heirs, func(it oxide.Instance) oxide.Name { return it.Name }), []string{"heir"})
	id = oxide.NameOrId(heirs[0].Id)

	becomes(oxide.InstanceStateRunning)

	nics = must(s.InstanceNetworkInterfaceList(ctx, oxide.InstanceNetworkInterfaceListParams{Instance: "heir", Project: project})).Items
	_, isDual := nics[0].IpStack.Value.(*oxide.PrivateIpStackDualStack)
	isTrue(isDual, "the interface has both kinds of address")

	thief := machine("thief")
	thief.BootDisk.Value = &oxide.InstanceDiskAttachmentAttach{Name: "web"}
	refused(s.InstanceCreate(ctx, create(thief))).with(oxide.ErrHTTP400, oxide.ErrInvalidRequest, "attached to another instance")

	must(s.InstanceStop(ctx, oxide.InstanceStopParams{Instance: id}))
	becomes(oxide.InstanceStateStopped)
	ok(s.InstanceDelete(ctx, oxide.InstanceDeleteParams{Instance: id}))

	for _, name := range []oxide.NameOrId{"data-web", "web"} {
		ok(s.DiskDelete(ctx, oxide.DiskDeleteParams{Project: project, Disk: name}))
	}
}

// kinds are what external addresses are.
func kinds(ips []oxide.ExternalIp) []string {
	var all []string
	for _, ip := range ips {
		all = append(all, string(ip.Kind()))
	}

	return all
}

func pages(ctx context.Context, s *session) {
	var made []string

	for i := range 5 {
		made = append(made, fmt.Sprintf("page-%d", i))
		must(s.DiskCreate(ctx, oxide.DiskCreateParams{Project: project, Body: blank(made[i], gib)}))
	}

	byName := func(it oxide.Disk) oxide.Name { return it.Name }
	list := func(params oxide.DiskListParams) (all []string, calls int) {
		for {
			page := must(s.DiskList(ctx, params))
			isTrue(len(page.Items) <= *params.Limit, "a page is no longer than asked for")
			all = append(all, names(page.Items, byName)...)
			calls++

			if page.NextPage == "" {
				return all, calls
			}

			params.PageToken = page.NextPage
		}
	}

	two := oxide.NewPointer(2)
	found, calls := list(oxide.DiskListParams{Project: project, Limit: two})
	equal(found, made)
	// Two, two, one, and none.
	equal(calls, 4)

	found, _ = list(oxide.DiskListParams{Project: project, Limit: two, SortBy: oxide.NameOrIdSortModeNameDescending})
	equal(found, []string{"page-4", "page-3", "page-2", "page-1", "page-0"})
	found, _ = list(oxide.DiskListParams{Project: project, Limit: two, SortBy: oxide.NameOrIdSortModeIdAscending})
	equal(len(found), 5)

	// The client's own way, and a token that says all by itself.
	equal(names(must2(s.DiskListAllPages(ctx, oxide.DiskListParams{Project: project})), byName), made)

	first := must(s.DiskList(ctx, oxide.DiskListParams{Project: project, Limit: oxide.NewPointer(4)}))
	rest := must(s.DiskList(ctx, oxide.DiskListParams{PageToken: first.NextPage}))
	equal(names(rest.Items, byName), []string{"page-4"})

	refused(s.DiskList(ctx, oxide.DiskListParams{PageToken: "nonsense"})).with(oxide.ErrHTTP400, nil, "token")
	refused(s.DiskList(ctx, oxide.DiskListParams{Project: project, Limit: oxide.NewPointer(0)})).with(oxide.ErrHTTP400, nil, "")
	refused(s.DiskList(ctx, oxide.DiskListParams{})).with(oxide.ErrHTTP400, nil, "project")

	for _, name := range made {
		ok(s.DiskDelete(ctx, oxide.DiskDeleteParams{Project: project, Disk: oxide.NameOrId(name)}))
	}
}

// must2 is for what the client makes of several answers.
func must2[T any](value T, err error) T {
	ok(err)

	return value
}

func refusals(ctx context.Context, s *session) {
	stranger, err := newSession(s.Host(), "nonsense")
	ok(err)
	refused(stranger.CurrentUserView(ctx)).with(oxide.ErrHTTP401, oxide.ErrUnauthenticated, "credentials")
	must(stranger.Ping(ctx))

	now = s

	bad := func(change func(*oxide.InstanceCreate)) refusal {
		body := machine("bad")
		change(body)

		return refused(s.InstanceCreate(ctx, oxide.InstanceCreateParams{Project: project, Body: body}))
	}

	bad(func(it *oxide.InstanceCreate) { it.Memory = gib + 1 }).with(oxide.ErrHTTP400, oxide.ErrInvalidValue, "1 GiB")
	bad(func(it *oxide.InstanceCreate) { it.Ncpus = 255 }).with(oxide.ErrHTTP400, oxide.ErrInvalidRequest, "254 vCPUs")
	bad(func(it *oxide.InstanceCreate) { it.UserData = "?" }).with(oxide.ErrHTTP400, nil, "user_data")
	bad(func(it *oxide.InstanceCreate) {
		it.UserData = base64.StdEncoding.EncodeToString([]byte(strings.Repeat("x", 32*1024+1)))
	}).with(oxide.ErrHTTP400, nil, "user_data")
	bad(func(it *oxide.InstanceCreate) { it.Name = "Bad" }).with(oxide.ErrHTTP400, nil, "lowercase")
	bad(func(it *oxide.InstanceCreate) { it.EnableJumboFrames = oxide.NewPointer(true) }).
		with(oxide.ErrHTTP400, oxide.ErrInvalidRequest, "jumbo")
	bad(func(it *oxide.InstanceCreate) { it.AntiAffinityGroups = []oxide.NameOrId{"none"} }).
		with(oxide.ErrHTTP404, oxide.ErrObjectNotFound, "anti-affinity-group")
	bad(func(it *oxide.InstanceCreate) {
		it.NetworkInterfaces.Value.(*oxide.InstanceNetworkInterfaceAttachmentCreate).Params[0].SubnetName = "none" //nolint:forcetypeassert
	}).with(oxide.ErrHTTP404, oxide.ErrObjectNotFound, "vpc-subnet")
	bad(func(it *oxide.InstanceCreate) {
		it.BootDisk.Value = &oxide.InstanceDiskAttachmentAttach{Name: "none"}
	}).with(oxide.ErrHTTP404, oxide.ErrObjectNotFound, "disk")
	bad(func(it *oxide.InstanceCreate) {
		for len(it.Disks) < 12 {
			it.Disks = append(it.Disks, it.Disks[0])
		}
	}).with(oxide.ErrHTTP400, oxide.ErrInvalidRequest, "12 disks")

	// Nothing of it was left behind.
	equal(len(must(s.InstanceList(ctx, oxide.InstanceListParams{Project: project})).Items), 0)
	equal(len(must(s.DiskList(ctx, oxide.DiskListParams{Project: project})).Items), 0)

	answer := must2(s.MakeRequest(ctx, oxide.Request{Method: "GET", Path: "/v1/no-such-thing"}))
	refusedAll(oxide.NewHTTPError(answer)).with(oxide.ErrHTTP404, nil, "Not Found")
	delete(s.calls, s.last)
}

// addresses needs a floating address of the name.
func addresses(ctx context.Context, s *session) {
	floating := must(s.FloatingIpView(ctx, oxide.FloatingIpViewParams{Project: project, FloatingIp: "front"}))
	equal(floating.InstanceId, "")
	equal(len(must(s.FloatingIpList(ctx, oxide.FloatingIpListParams{Project: project})).Items), 1)

	body := machine("front")
	body.ExternalIps = []oxide.ExternalIpCreate{{Value: &oxide.ExternalIpCreateFloating{FloatingIp: "front"}}}
	made := must(s.InstanceCreate(ctx, oxide.InstanceCreateParams{Project: project, Body: body}))

	ips := must(s.InstanceExternalIpList(ctx, oxide.InstanceExternalIpListParams{Instance: oxide.NameOrId(made.Id)})).Items
	equal(kinds(ips), []string{"snat", "floating"})

	held, isFloating := ips[1].Value.(*oxide.ExternalIpFloating)
	isTrue(isFloating && held.Id == floating.Id && held.InstanceId == made.Id, "the address is the instance's")
	equal(must(s.FloatingIpView(ctx, oxide.FloatingIpViewParams{FloatingIp: oxide.NameOrId(floating.Id)})).InstanceId, made.Id)

	body = machine("other")
	body.ExternalIps = []oxide.ExternalIpCreate{{Value: &oxide.ExternalIpCreateFloating{FloatingIp: "front"}}}
	body.NetworkInterfaces.Value = &oxide.InstanceNetworkInterfaceAttachmentDefaultIpv4{}
	refused(s.InstanceCreate(ctx, oxide.InstanceCreateParams{Project: project, Body: body})).
		with(oxide.ErrHTTP400, oxide.ErrInvalidRequest, "floating IP")
}

// capacity needs a rack with less room than an instance takes.
func capacity(ctx context.Context, s *session) {
	made := must(s.InstanceCreate(ctx, oxide.InstanceCreateParams{Project: project, Body: machine("large")}))
	refused(s.InstanceStart(ctx, oxide.InstanceStartParams{Instance: oxide.NameOrId(made.Id)})).
		with(oxide.ErrHTTP507, oxide.ErrInsufficientCapacity, "Insufficient capacity")

	// What is to be started at once is made all the same, and the failure is told to nobody.
	body := machine("hidden")
	body.Start = oxide.NewPointer(true)
	body.NetworkInterfaces.Value = &oxide.InstanceNetworkInterfaceAttachmentNone{}
	equal(must(s.InstanceCreate(ctx, oxide.InstanceCreateParams{Project: project, Body: body})).RunState, oxide.InstanceStateStopped)
}

// shortPages needs a rack whose pages have two items.
func shortPages(ctx context.Context, s *session) {
	for i := range 5 {
		body := blank(fmt.Sprintf("page-%d", i), gib)
		must(s.DiskCreate(ctx, oxide.DiskCreateParams{Project: project, Body: body}))
	}

	equal(len(must(s.DiskList(ctx, oxide.DiskListParams{Project: project, Limit: oxide.NewPointer(100)})).Items), 2)
	equal(len(must2(s.DiskListAllPages(ctx, oxide.DiskListParams{Project: project}))), 5)
}

// tooNew needs a rack that is older than the client.
func tooNew(ctx context.Context, s *session) {
	refused(s.Ping(ctx)).with(oxide.ErrHTTP400, nil, "server does not support this API version")
	refused(s.CurrentUserView(ctx)).with(oxide.ErrHTTP400, nil, "server does not support this API version")
}

// shutOut needs a project that the token has lost.
func shutOut(ctx context.Context, s *session) {
	must(s.CurrentUserView(ctx))
	equal(len(must(s.ProjectList(ctx, oxide.ProjectListParams{})).Items), 0)
	refused(s.ProjectView(ctx, oxide.ProjectViewParams{Project: project})).with(oxide.ErrHTTP404, oxide.ErrObjectNotFound, "project")
	refused(s.InstanceList(ctx, oxide.InstanceListParams{Project: project})).with(oxide.ErrHTTP404, oxide.ErrObjectNotFound, "project")
}
