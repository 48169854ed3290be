// SPDX-License-Identifier: LGPL-2.1-or-later

// Package inspectproto serves the protocol of package inspect: it answers what the daemon holds, does and has done, and
// gives up a lock by an administrator's order.
//
// Nothing here keeps a client of the lock program waiting: the table is read in small parts, and everything else is done
// without its mutex, letting others go first every now and then.
package inspectproto

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"time"

	"virtlockd/internal/events"
	"virtlockd/internal/filelock"
	"virtlockd/internal/inspect"
	"virtlockd/internal/lockspace"
	"virtlockd/internal/owner"
	"virtlockd/internal/rpc"
	"virtlockd/internal/verify"
	"virtlockd/internal/watch"
)

// Life is the daemon's own history.
type Life struct {
	Started, Serving     time.Time // the first binary in this process; this one
	Upgrades, Recoveries uint64
}

// Config of the programs. Every field is needed.
type Config struct {
	Table   *lockspace.Table
	Files   *filelock.Files
	Events  *events.Log
	Checker *verify.Checker
	Watcher *watch.Watcher
	// Safe tells whether locks outlive a crash of the daemon, why not, and how many do.
	Safe    func() (on bool, why string, locks int)
	Servers func() []*rpc.Server
	Life    func() Life
	// Dropped is how many log messages were lost.
	Dropped func() uint64
	Logger  *slog.Logger
}

// Programs returns the program that reads and the one that changes.
func Programs(cfg Config) []rpc.Program {
	return []rpc.Program{&reader{cfg}, &writer{cfg}}
}

// reader is the program that changes nothing.
type reader struct{ cfg Config }

// ID implements rpc.Program.
func (*reader) ID() (program, version uint32) { return inspect.ReadProgram, inspect.Version }

// Undo implements rpc.Program.
func (*reader) Undo(*rpc.Client) {}

// Closed implements rpc.Program.
func (*reader) Closed(*rpc.Client, bool) {}

// Call implements rpc.Program.
func (p *reader) Call(c *rpc.Client, proc uint32, payload, out []byte) ([]byte, error) {
	switch proc {
	case inspect.ProcReadOnly:
		c.SetReadOnly()
		c.Changed()
		return out, nil
	case inspect.ProcStatus:
		return inspect.Append(out, p.status())
	case inspect.ProcLocks:
		var req inspect.Part
		if err := decode(payload, &req); err != nil {
			return out, err
		}
		return p.locks(c, &req, out), nil
	case inspect.ProcEvents:
		var req inspect.EventsRequest
		if err := decode(payload, &req); err != nil {
			return out, err
		}
		return inspect.Append(out, p.events(&req))
	case inspect.ProcCheck:
		var req inspect.Part
		if err := decode(payload, &req); err != nil {
			return out, err
		}
		return inspect.Append(out, p.check(c, &req))
	}
	return out, rpc.ErrNoProc
}

// decode reads the arguments of a call. That they are no JSON is as wrong as that they are no XDR.
func decode(payload []byte, v any) error {
	if err := inspect.Decode(payload, inspect.MaxRequest, v); err != nil {
		return rpc.ErrDecode
	}
	return nil
}

// part bounds how much of a list is asked for.
func part(limit int) int {
	if limit <= 0 || limit > inspect.MaxPart {
		return inspect.MaxPart
	}
	return limit
}

const (
	// turn is how many locks are read with the table's mutex held, and described without letting others go first.
	turn = 16
	// maxBytes is about how large a part becomes. A larger one would have to be moved about while it grows, and be collected afterwards,
	// while others lock.
	maxBytes = 64 << 10
	// maxName is how much of a domain's name is told: a lock can have thousands of owners.
	maxName = 256
	// checkTime is about how long one call checks.
	checkTime = 2 * time.Second
	// diskTime is how long an administrator's order waits for a disk before it is answered, and grace how long for what has just ended.
	diskTime = 5 * time.Second
	grace    = 50 * time.Millisecond
	// maxCalls is how many calls in progress are told one by one.
	maxCalls = 32
)

// locks describes a part of the table. The next part may begin within a turn.
func (p *reader) locks(c *rpc.Client, req *inspect.Part, out []byte) []byte {
	limit, next := part(req.Limit), req.From
	e := inspect.EncodeLocks(out)
	for pause := newPause(); ; pause.rest() {
		n, _ := e.Len()
		var entries []lockspace.Entry
		entries, next = p.cfg.Table.List(next, min(turn, limit-n))
		for i := range entries {
			l := describe(&entries[i])
			e.Add(&l)
			if _, bytes := e.Len(); bytes > maxBytes && i+1 < len(entries) {
				next = entries[i].Slot + 1
				break
			}
		}
		if n, bytes := e.Len(); next == 0 || n >= limit || bytes > maxBytes || c.Over() || c.Hurry() {
			return e.End(p.table(), next)
		}
	}
}

// table names the table of this binary: the places in that of another one are others.
func (p *reader) table() int64 { return p.cfg.Life().Serving.UnixNano() }

// pause keeps whoever looks from taking the processor from those who lock: after each turn it rests for longer than the
// turn took.
type pause struct{ begin time.Time }

func newPause() *pause { return &pause{time.Now()} }

func (p *pause) rest() {
	time.Sleep(max(2*time.Since(p.begin), 50*time.Microsecond))
	p.begin = time.Now()
}

func describe(e *lockspace.Entry) inspect.Lock {
	id := e.Lock.ID()
	l := inspect.Lock{
		Lockspace: inspect.Text(e.Lockspace), Resource: inspect.Text(e.Resource), Path: inspect.Text(e.Path),
		Mode: mode(e.Shared), Kind: "OFD",
		AutoCreate: e.AutoCreate, Remote: e.Lock.Remote(), CrashSafe: e.Stored(),
		File:   inspect.File{Dev: id.Dev, Ino: id.Ino, Block: id.Block},
		Owners: make([]inspect.Owner, len(e.Holds)),
	}
	if e.Lock.Kind() == filelock.POSIX {
		l.Kind = "POSIX"
	}
	for i, h := range e.Holds {
		l.Owners[i] = describeOwner(h.Owner.Details(), h.Owner.PID)
		l.Owners[i].Kind = h.Owner.Kind().String()
		l.Owners[i].Since = at(h.Since)
	}
	return l
}

func describeOwner(d *owner.Details, pid int32) inspect.Owner {
	return inspect.Owner{Name: inspect.Text(d.Name[:min(len(d.Name), maxName)]), UUID: d.UUIDString(), PID: pid}
}

func mode(shared bool) string {
	if shared {
		return "shared"
	}
	return "exclusive"
}

// at makes a time of what is zero if it is not known.
func at(ns int64) time.Time {
	if ns == 0 {
		return time.Time{}
	}
	return time.Unix(0, ns).UTC()
}

func (p *reader) events(req *inspect.EventsRequest) *inspect.Events {
	found, next, missed := p.cfg.Events.Since(nil, req.After, part(req.Limit))
	reply := &inspect.Events{Events: make([]inspect.Event, len(found)), Next: next, Missed: missed}
	for i := range found {
		reply.Events[i] = describeEvent(&found[i])
	}
	return reply
}

func describeEvent(e *events.Event) inspect.Event {
	out := inspect.Event{
		Seq: e.Seq, Time: at(e.Time), Kind: e.Kind.String(), Reason: string(e.Reason),
		Lockspace: inspect.Text(e.Lockspace), Resource: inspect.Text(e.Resource), Text: inspect.Text(e.Text),
	}
	if e.Resource != "" {
		out.Mode = mode(e.Shared)
	}
	if e.Owner != "" || e.PID != 0 || e.UUID != [16]byte{} {
		o := describeOwner(&owner.Details{Name: e.Owner, UUID: e.UUID}, e.PID)
		out.Owner = &o
	}
	return out
}

// check checks locks one after the other, as long as the client waits and the time is not up.
func (p *reader) check(c *rpc.Client, req *inspect.Part) *inspect.Checks {
	limit, begin := part(req.Limit), time.Now()
	reply := &inspect.Checks{Faulty: []inspect.Finding{}, Table: p.table(), Next: req.From}
	size := inspect.EncodeLocks(nil) // of what is found
	enough := func() bool {
		_, bytes := size.Len()
		return bytes > maxBytes || time.Since(begin) > checkTime || c.Over() || c.Hurry()
	}
	for pause := newPause(); ; pause.rest() {
		var entries []lockspace.Entry
		entries, reply.Next = p.cfg.Table.List(reply.Next, min(turn, limit-reply.Checked))
		for i := range entries {
			p.checkOne(&entries[i], reply, size)
			if enough() && i+1 < len(entries) {
				reply.Next = entries[i].Slot + 1
				break
			}
		}
		if reply.Next == 0 || reply.Checked >= limit || enough() {
			return reply
		}
	}
}

func (p *reader) checkOne(e *lockspace.Entry, reply *inspect.Checks, size *inspect.LocksEncoder) {
	reply.Checked++
	found := p.cfg.Checker.Check(e)
	if len(found) == 0 {
		return
	}
	f := inspect.Finding{Lock: describe(e)}
	size.Add(&f.Lock)
	for _, problem := range found {
		f.Problems = append(f.Problems, inspect.Problem{Kind: string(problem.Kind), Text: inspect.Text(problem.Text)})
	}
	reply.Faulty = append(reply.Faulty, f)
}

// writer is the program that changes something.
type writer struct{ cfg Config }

// ID implements rpc.Program.
func (*writer) ID() (program, version uint32) { return inspect.WriteProgram, inspect.Version }

// Undo implements rpc.Program. What an administrator did stays so, whether or not he heard of it.
func (*writer) Undo(*rpc.Client) {}

// Closed implements rpc.Program.
func (*writer) Closed(*rpc.Client, bool) {}

// Call implements rpc.Program.
func (p *writer) Call(c *rpc.Client, proc uint32, payload, out []byte) ([]byte, error) {
	if c.ReadOnly() {
		return out, rpc.Ordinary(rpc.CodeOperationDenied, rpc.DomainAdmin, "operation forbidden: %s", "this connection is read only")
	}
	var reply any
	var err error
	switch proc {
	case inspect.ProcRelease:
		var req inspect.ReleaseRequest
		if err := decode(payload, &req); err != nil {
			return out, err
		}
		reply, err = p.release(c, &req)
	case inspect.ProcResume:
		var req inspect.ResumeRequest
		if err := decode(payload, &req); err != nil {
			return out, err
		}
		reply, err = p.resume(c, string(req.Who))
	default:
		return out, rpc.ErrNoProc
	}
	if err != nil {
		return out, rpc.Ordinary(rpc.CodeOperationInvalid, rpc.DomainAdmin, "Requested operation is not valid: %s", err.Error())
	}
	return inspect.Append(out, reply)
}

// release takes a lock from its owner. The log says so, since a guest may go on without protection.
func (p *writer) release(c *rpc.Client, req *inspect.ReleaseRequest) (*inspect.Released, error) {
	what := lockspace.Request{Lockspace: string(req.Lockspace), Resource: string(req.Resource)}
	var since int64
	if !req.Since.IsZero() {
		since = req.Since.UnixNano()
	}
	ctx, cancel := waitingWith(c)
	defer cancel()
	what.Client = ctx
	who, left, done, err := p.cfg.Table.Break(what, req.PID, since)
	switch {
	case errors.Is(err, lockspace.ErrSeveral):
		err = fmt.Errorf("%w: say which one by its process id", err)
	case errors.Is(err, lockspace.ErrGone):
		err = fmt.Errorf("%w: another request works on it, whose disk has not answered; try again", err)
	}
	administrator := slog.Group("administrator", slog.Int("pid", int(c.PID())), slog.Uint64("client", c.ID()))
	if err != nil {
		p.cfg.Logger.Warn("a lock was not taken from its owner, as an administrator wants it", "error", err, administrator)
		return nil, err
	}
	p.cfg.Logger.Warn("a lock was taken from its owner by an administrator; if the guest runs it goes on without protection",
		"lockspace", what.Lockspace, "resource", what.Resource, "", who, administrator)
	reply := &inspect.Released{Owner: describeOwner(who, who.PID), Left: left}
	select {
	case <-done:
	case <-ctx.Done():
		reply.Waiting = true
	}
	return reply, nil
}

// waitingWith returns a context that ends when an answer can't wait any longer for a disk: after diskTime, when the client has gone, or
// when a live upgrade waits for the answer.
func waitingWith(c *rpc.Client) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(context.Background(), diskTime)
	go func() {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for ctx.Err() == nil && !c.Over() && !c.Hurry() {
			select {
			case <-ctx.Done():
			case <-tick.C:
			}
		}
		cancel()
	}()
	return ctx, cancel
}

// resume continues an owner who was stopped because a lock was lost.
func (p *writer) resume(c *rpc.Client, who string) (*inspect.Owner, error) {
	ctx, cancel := waitingWith(c)
	defer cancel()
	type answer struct {
		d   *owner.Details
		err error
	}
	answers := make(chan answer, 1)
	go func() {
		d, err := p.cfg.Watcher.Resume(ctx, func(o *owner.Owner) bool {
			d := o.Details()
			return d.Name == who || d.UUIDString() == who || strconv.Itoa(int(o.PID)) == who
		})
		answers <- answer{d, err}
	}()
	d, err := (*owner.Details)(nil), error(watch.ErrNoTime)
	select {
	case a := <-answers:
		d, err = a.d, a.err
	case <-ctx.Done():
		select { // it may have been faster
		case a := <-answers:
			d, err = a.d, a.err
		case <-time.After(grace):
		}
	}
	administrator := slog.Group("administrator", slog.Int("pid", int(c.PID())), slog.Uint64("client", c.ID()))
	if err != nil {
		p.cfg.Logger.Warn("an owner is not continued, as an administrator wants it", "owner", who, "error", err, administrator)
		return nil, err
	}
	p.cfg.Logger.Warn("an owner is continued by an administrator", "", d, administrator)
	o := describeOwner(d, d.PID)
	return &o, nil
}
