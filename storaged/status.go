package storaged

import (
	"cmp"
	"slices"

	"google.golang.org/protobuf/proto"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
	"github.com/bulkhead-os/bulkhead/storaged/probe"
	"github.com/bulkhead-os/bulkhead/storaged/vault"
)

// maxMounts bounds the mounts in a status.
const maxMounts = 512

// report is called by the loop after each round.
func (d *Daemon) report(have State) {
	now := d.loop.State()
	_, desired := d.loop.Spec()
	st := status(have, now)
	d.meters.set(st, desired)
	if was, _ := d.status.Get(); !proto.Equal(was, st) {
		d.status.Set(st)
	}
}

// status is what was found, for people. Lists are sorted.
func status(have State, loop *controlv1.State) *storagev1.Status {
	st := &storagev1.Status{
		Generation: loop.GetGeneration(), Converged: loop.GetConverged(), Pending: loop.GetPending(), Error: loop.GetError(),
	}
	for _, d := range have.Disks {
		st.Disks = append(st.Disks, &storagev1.Disk{
			Device: d.Device, SizeBytes: uint64(d.Size), Transport: d.Transport, Model: d.Model, Serial: d.Serial,
			ReadOnly: d.ReadOnly, Rotational: d.Rotational, Content: string(d.Content.Kind), System: d.System, Wwn: d.WWN, Removable: d.Removable,
		})
		for _, p := range d.Partitions {
			q := &storagev1.Partition{
				Device: node(d.Device, p.Number), Disk: d.Device, Number: uint32(p.Number), Label: p.Name,
				StartBytes: uint64(p.Start()), SizeBytes: uint64(p.Size()),
			}
			if p.GUID != (gpt.GUID{}) {
				q.TypeGuid, q.Guid = p.Type.String(), p.GUID.String()
			}
			st.Partitions = append(st.Partitions, q)
		}
	}
	for _, v := range volumes {
		st.Volumes = append(st.Volumes, volumeStatus(have, v))
	}
	for _, m := range have.Mounts[:min(len(have.Mounts), maxMounts)] {
		st.Mounts = append(st.Mounts, &storagev1.Mount{Source: m.Source, Target: m.Target, Filesystem: m.Filesystem, Options: m.Options})
	}
	t := have.TPM
	st.Tpm = &storagev1.Tpm{Present: t.TPM, Unusable: t.Useless(), Capped: t.Capped, Owned: t.Owned, Epoch: uint32(t.Epoch), ImageEpoch: uint32(t.ImageEpoch)}
	st.Install = installStatus(have)
	slices.SortStableFunc(st.Mounts, func(a, b *storagev1.Mount) int { return cmp.Compare(a.Target, b.Target) })
	return st
}

func installStatus(have State) *storagev1.Install {
	where, disk := have.installed()
	if where == "" {
		return nil
	}
	if p := have.Install.Progress; where == installCopying && p.Disk == disk.Device {
		return p.status()
	}
	return &storagev1.Install{Disk: disk.Device, State: where}
}

// status is what is being copied.
func (p Progress) status() *storagev1.Install {
	elapsed := p.At.Sub(p.Since)
	out := &storagev1.Install{Disk: p.Disk, State: installCopying, Step: p.Step, DoneBytes: uint64(p.Done), TotalBytes: uint64(p.Total), ElapsedSeconds: uint32(elapsed.Seconds())}
	if p.Done > 0 {
		out.ExpectedSeconds = uint32(elapsed.Seconds() * float64(p.Total) / float64(p.Done))
	}
	return out
}

// progress is called while something is copied, between two rounds.
func (d *Daemon) progress(p Progress) {
	was, _ := d.status.Get()
	st := proto.CloneOf(was)
	st.Install = p.status()
	d.status.Set(st)
}

func volumeStatus(have State, v volume) *storagev1.Volume {
	out := &storagev1.Volume{Name: string(v.name), State: "missing"}
	home, err := have.home("")
	if err != nil {
		out.State, out.Detail = "error", err.Error()
		return out
	}
	if home == nil {
		return out
	}
	p, ok := home.volume(v)
	if !ok {
		return out
	}
	out.Device, out.SizeBytes = node(home.Device, p.Number), uint64(p.Size())
	if p.Attributes&unformatted != 0 {
		out.Detail = "has a partition, which is not formatted yet"
		return out
	}
	out.Encryption = "none"
	if p.encrypted() {
		out.Encryption, out.Keys = "luks2", keyStatus(v, p.LUKS)
	}
	data := p.data()
	switch whole := data.Content.Kind == probe.Ext4 && data.Content.Label == v.label; {
	case have.isMounted(v, p):
		s := have.Volumes[v.name]
		out.State, out.Filesystem = "mounted", "ext4"
		out.SizeBytes, out.FreeBytes = uint64(s.Size), uint64(s.Free/mib*mib) // the newest few KiB are no change worth telling
		switch {
		case data.Content.Dirty:
			out.Detail = "the file system has recorded errors; it is checked at the next boot"
		case p.encrypted() && p.Why != "":
			out.Detail = "it was unlocked by a person, because it did not open by itself: " + p.Why
		}
	case p.encrypted() && p.LUKS.Unusable != "":
		out.State, out.Detail = "error", p.LUKS.Unusable
	case p.encrypted() && data.Device == "":
		out.State, out.Detail = "locked", have.why(p)
	case whole:
		out.State, out.Filesystem = "formatted", "ext4"
	default:
		out.State, out.Detail = "error", "found "+data.Content.String()+" where the file system ext4 must be"
	}
	return out
}

// keyStatus lists what opens a volume.
func keyStatus(v volume, h vault.Header) (out []*storagev1.Key) {
	for _, k := range h.Keys {
		out = append(out, keyOf(string(v.name), k))
	}
	return out
}

func keyOf(volume string, k vault.Key) *storagev1.Key {
	return &storagev1.Key{Id: vault.ID(volume, k.Slot), Volume: volume, Kind: string(k.Kind), Detail: k.Detail}
}

// meters are the figures for Prometheus.
type meters struct {
	desired, observed, converged  *metrics.Vec
	disks, volumeSize, volumeFree *metrics.Vec
	locked, refused               *metrics.Vec
}

func newMeters(s *metrics.Set) meters {
	return meters{
		desired:    s.Gauge("bulkhead_storaged_generation_desired", "Generation of the configuration that was handed out last."),
		observed:   s.Gauge("bulkhead_storaged_generation_observed", "Generation of the configuration in the last round."),
		converged:  s.Gauge("bulkhead_storaged_converged", "1 if the last round found nothing left to do."),
		disks:      s.Gauge("bulkhead_storaged_disks", "Disks that are seen."),
		volumeSize: s.Gauge("bulkhead_storaged_volume_size_bytes", "Size of a mounted volume's file system.", "volume"),
		locked:     s.Gauge("bulkhead_storaged_volume_locked", "1 if an encrypted volume is not open.", "volume"),
		refused:    s.Counter("bulkhead_storaged_unlocks_refused_total", "Wrong keys that were shown to open a volume."),
		volumeFree: s.Gauge("bulkhead_storaged_volume_free_bytes", "What programs other than root may still write to a mounted volume.", "volume"),
	}
}

func (m meters) set(st *storagev1.Status, desired uint64) {
	m.desired.Set(float64(desired))
	m.observed.Set(float64(st.Generation))
	converged := 0.0
	if st.Converged {
		converged = 1
	}
	m.converged.Set(converged)
	m.disks.Set(float64(len(st.Disks)))
	m.volumeSize.Reset()
	m.volumeFree.Reset()
	m.locked.Reset()
	for _, v := range st.Volumes {
		if v.Encryption == "luks2" {
			m.locked.Set(map[bool]float64{true: 1}[v.State == "locked"], v.Name)
		}
		if v.State == "mounted" {
			m.volumeSize.Set(float64(v.SizeBytes), v.Name)
			m.volumeFree.Set(float64(v.FreeBytes), v.Name)
		}
	}
}
