// SPDX-License-Identifier: LGPL-2.1-or-later

// Package watch looks at all locks that are held, about once a minute, and acts when one is lost beneath its owner.
//
// It is as slow as it may be: nobody who locks something waits for it, and a disk that hangs keeps it from that disk only.
package watch

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/events"
	"virtlockd/internal/filelock"
	"virtlockd/internal/lockspace"
	"virtlockd/internal/owner"
	"virtlockd/internal/verify"
)

// What is done to the owner of a lock that is lost.
const (
	Log   = "log"   // nothing
	Pause = "pause" // it is stopped
	Kill  = "kill"
)

const (
	// passTime is about how long it takes to look at every lock once.
	passTime = time.Minute
	// part is how many locks are taken from the table in one go.
	part = 16
	// confirmTime is how long a path has to lead elsewhere before anything is done to the lock's owner: a path may be changed and put
	// back by a multipath failover, an administrator, a mount that is renewed.
	confirmTime = 10 * time.Second
	// maxActing bounds the locks of one mount that are being taken again: each may wait for the disk.
	maxActing = 16
)

// Config of a Watcher. Every field is needed but Pass and Confirm.
type Config struct {
	Table   *lockspace.Table
	Checker *verify.Checker
	Events  *events.Log
	Logger  *slog.Logger
	Action  func() string // Log, Pause or Kill, as it is configured now
	Pass    time.Duration // 0: passTime
	Confirm time.Duration // 0: confirmTime
}

// A Watcher watches the locks of a table.
type Watcher struct {
	cfg Config

	mu     sync.Mutex
	locks  map[name]*watched // those that were not found to be as they should be; there may be many others
	before time.Time         // when the last pass began; all others were looked at since, and were fine
	acting map[string]int    // how many locks are being taken again, by mount
}

type name struct{ lockspace, resource string }

func nameOf(e *lockspace.Entry) name { return name{e.Lockspace, e.Resource} }

// watched is a lock that is not as it should be, or of which that is not known. Its fields are owned by Watcher.mu.
type watched struct {
	lock *filelock.Lock // another one is another lock
	good time.Time      // when it was last seen to be held
	told grade          // what was told and done already
	busy bool           // its loss is being dealt with
	seen uint64
}

// grade says how bad it is. What was found of a lock is dealt with once, and again only if it has become worse.
type grade uint8

const (
	fine    grade = iota
	open          // it is gone, and nobody can say who has it: told
	faulty        // the file can't be read, but the lock is held: told
	invalid       // it protects nobody: told, and its owner is dealt with
)

// New returns a watcher.
func New(cfg Config) *Watcher {
	cfg.Pass, cfg.Confirm = cmp.Or(cfg.Pass, passTime), cmp.Or(cfg.Confirm, confirmTime)
	return &Watcher{cfg: cfg, locks: map[name]*watched{}, acting: map[string]int{}}
}

// Run looks at all locks again and again until ctx is done.
func (w *Watcher) Run(ctx context.Context) {
	for pass := uint64(1); ; pass++ {
		begin := time.Now()
		pace := w.cfg.Pass / time.Duration(w.cfg.Table.Held()+1)
		if !rest(ctx, pace) {
			return
		}
		for from, more := 0, true; more; more = from != 0 {
			var entries []lockspace.Entry
			entries, from = w.cfg.Table.List(from, part)
			for i := range entries {
				w.look(ctx, &entries[i], pass)
			}
			// Together, since to wake up for each costs more than to look at it.
			if !rest(ctx, pace*time.Duration(len(entries))) {
				return
			}
		}
		w.forget(pass, begin)
		if !rest(ctx, w.cfg.Pass-time.Since(begin)) {
			return
		}
	}
}

func rest(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// forget ends a pass that has begun then, and forgets locks that are not held any more.
func (w *Watcher) forget(pass uint64, begin time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.before = begin
	for n, l := range w.locks {
		if l.seen != pass && !l.busy {
			delete(w.locks, n)
		}
	}
}

// losses are the findings that mean that a lock does not do its work, the gravest first.
var losses = []struct {
	kind   verify.Kind
	reason events.Reason
}{
	{verify.Gone, events.Gone}, {verify.Unreadable, events.Unreadable}, {verify.Replaced, events.Replaced}, {verify.Deleted, events.Deleted},
}

// verdict is what a check has come to: why the lock is lost, "" if it is not, and whether that is known at all.
func verdict(found []verify.Finding) (lost events.Reason, text string, known bool) {
	for _, l := range losses {
		for _, f := range found {
			if f.Kind == l.kind {
				return l.reason, f.Text, true
			}
		}
	}
	for _, f := range found {
		switch f.Kind {
		case verify.NoAnswer, verify.NotChecked, verify.Invisible:
			return "", f.Text, false
		}
	}
	return "", "", true
}

// look checks one lock.
func (w *Watcher) look(ctx context.Context, e *lockspace.Entry, pass uint64) {
	l := w.watched(e, pass)
	if l == nil {
		return
	}
	found := w.cfg.Checker.Check(e)
	now := time.Now()
	if _, current := w.cfg.Table.Current(e); !current {
		return
	}
	lost, text, known := verdict(found)
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case !known:
		w.locks[nameOf(e)] = l
	case lost == "":
		if l.told != fine {
			w.cfg.Logger.Warn("a lock that was lost is as it should be again", "path", e.Path, "", e.Holds[0].Owner.Details())
		}
		delete(w.locks, nameOf(e))
	default:
		w.locks[nameOf(e)] = l
		l.busy = true
		free, told := now.Sub(l.good), l.told
		go func() {
			told = w.act(ctx, e, lost, text, free, told)
			w.mu.Lock()
			defer w.mu.Unlock()
			l.busy, l.told, l.lock = false, told, e.Lock // which may be another one now
			if told == fine {
				l.good = time.Now()
			}
		}()
	}
}

// watched returns what is known of a lock, nil if its loss is being dealt with.
func (w *Watcher) watched(e *lockspace.Entry, pass uint64) *watched {
	w.mu.Lock()
	defer w.mu.Unlock()
	l := w.locks[nameOf(e)]
	if l == nil || l.lock != e.Lock && !l.busy {
		l = &watched{lock: e.Lock, good: time.Unix(0, e.Holds[0].Since)}
		if e.Holds[0].Since == 0 { // not known
			l.good = time.Now()
		}
		if l.good.Before(w.before) {
			l.good = w.before
		}
	}
	l.seen = pass
	if l.busy {
		return nil
	}
	return l
}

// act deals with a lock that is lost: it takes it again if it can, else it tells, and does what is configured if it is sure: somebody else
// has the lock, or its path has led elsewhere for a while. told is what was told and done before, and it returns what is now.
func (w *Watcher) act(ctx context.Context, e *lockspace.Entry, lost events.Reason, text string, free time.Duration, told grade) grade {
	free = free.Round(time.Second)
	err := w.regain(e, lost)
	if elsewhere(err) && told != invalid {
		w.cfg.Logger.Warn("the path of a lock leads elsewhere; it is looked at again before anything is done",
			"path", e.Path, "", e.Holds[0].Owner.Details(), "found", text, "again_in", w.cfg.Confirm)
		if !rest(ctx, w.cfg.Confirm) {
			return told
		}
		var known bool
		if lost, text, known = verdict(w.cfg.Checker.Check(e)); !known {
			return told
		}
		if lost == "" {
			w.cfg.Logger.Warn("the path of a lock leads to the locked file again", "path", e.Path, "", e.Holds[0].Owner.Details())
			return fine
		}
		err = w.regain(e, lost)
	}
	holds, current := w.cfg.Table.Current(e)
	if !current || ctx.Err() != nil {
		return told // released meanwhile, or it is the next watcher's
	}
	attrs := []any{"path", e.Path, "", holds[0].Owner.Details(), "found", text}
	message := "a lock is lost while its owner lives: another guest can write to the same disk"
	switch {
	case err == nil:
		w.cfg.Logger.Error("a lock was lost while its owner lives, and is taken again; until then anybody could have had it",
			append(attrs, "free_for_at_most", free)...)
		w.report(events.Lost, e, holds, lost, fmt.Sprintf("%s; taken again, it may have been free for up to %v", text, free))
		return fine
	case errors.Is(err, filelock.ErrUnreadable):
		if told < faulty {
			w.cfg.Logger.Error("the file of a lock can't be read; the lock itself is held, as far as can be told, so nothing is done to its owner", attrs...)
			w.report(events.Faulty, e, holds, lost, text+"; the lock is held")
		}
		return max(told, faulty)
	case told == invalid:
		return told // nothing new
	case elsewhere(err):
		message = "the path of a lock leads elsewhere while its owner lives: the lock is on the old file, and another guest can lock what is at the path"
	case !errors.Is(err, filelock.ErrLocked): // the next pass tries it again
		if told < open {
			w.cfg.Logger.Error("a lock is lost while its owner lives, and can't be taken again yet; nothing is done to its owner before somebody else has it",
				append(attrs, "good_until_ago", free, "not_taken_again", err)...)
			w.report(events.Lost, e, holds, lost, fmt.Sprintf("%s; it was good %v ago; not taken again yet: %v", text, free, err))
		}
		return max(told, open)
	}
	action := w.cfg.Action()
	w.cfg.Logger.Error(message, append(attrs, "good_until_ago", free, "not_taken_again", err, "lock_lost_action", action)...)
	w.report(events.Lost, e, holds, lost, fmt.Sprintf("%s; it was good %v ago; not taken again: %v", text, free, err))
	for _, o := range owners(holds) {
		w.punish(o, action)
	}
	return invalid
}

var (
	errElsewhere = errors.New("its path does not lead to the locked file any more")
	errTooMany   = errors.New("others on the same disk are being taken again, and have had no answer yet")
)

// elsewhere tells whether a lock can't be taken again because its path leads elsewhere.
func elsewhere(err error) bool {
	return errors.Is(err, errElsewhere) || errors.Is(err, filelock.ErrReplaced) || errors.Is(err, unix.ENOENT)
}

// punish does what is configured to the owner of a lost lock.
func (w *Watcher) punish(o *owner.Owner, action string) {
	var err error
	done := ""
	switch action {
	case Pause:
		err, done = w.stop(o), "the owner of a lost lock is stopped; virtlockctl resume continues it when its locks are held"
	case Kill:
		err, done = o.Kill(), "the owner of a lost lock is killed"
	default:
		return
	}
	switch {
	case errors.Is(err, owner.ErrDead):
	case err != nil:
		w.cfg.Logger.Error("the owner of a lost lock goes on", "", o.Details(), "error", err)
	default:
		w.cfg.Logger.Error(done, "", o.Details())
	}
}

func (w *Watcher) stop(o *owner.Owner) error {
	err := o.Stop()
	if err == nil {
		w.cfg.Table.NoteOwner(o)
	}
	return err
}

// regain takes a lost lock again. A path that leads elsewhere can't be helped by that. filelock.ErrUnreadable says that it is held.
func (w *Watcher) regain(e *lockspace.Entry, lost events.Reason) error {
	if lost == events.Replaced || lost == events.Deleted {
		return errElsewhere
	}
	mount := e.Lock.Mount()
	if !w.enter(mount) {
		return errTooMany
	}
	defer w.leave(mount)
	if err := w.cfg.Table.Regain(e, lost == events.Unreadable); err != nil {
		return err
	}
	switch again, text, known := verdict(w.cfg.Checker.Check(e)); {
	case again == events.Unreadable:
		return filelock.ErrUnreadable
	case again != "" || !known:
		return errors.New(text)
	}
	return nil
}

// enter takes a place among those who take locks of a mount again.
func (w *Watcher) enter(mount string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.acting[mount] >= maxActing {
		return false
	}
	w.acting[mount]++
	return true
}

func (w *Watcher) leave(mount string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.acting[mount]--; w.acting[mount] == 0 {
		delete(w.acting, mount)
	}
}

func (w *Watcher) report(kind events.Kind, e *lockspace.Entry, holds []lockspace.Holding, lost events.Reason, text string) {
	o := holds[0].Owner
	d := o.Details()
	w.cfg.Events.Add(events.Event{
		Kind: kind, Reason: lost, Shared: e.Shared, Lockspace: e.Lockspace, Resource: e.Resource,
		Owner: d.Name, UUID: d.UUID, PID: o.PID, Text: text,
	})
}

func owners(holds []lockspace.Holding) (all []*owner.Owner) {
	for _, h := range holds {
		if !slices.Contains(all, h.Owner) {
			all = append(all, h.Owner)
		}
	}
	return all
}

// Errors of Resume.
var (
	ErrNobody  = errors.New("nobody of that name, UUID or process id holds a lock here")
	ErrSeveral = errors.New("several owners have that name: say which one by its process id")
	ErrNoTime  = errors.New("it stays stopped, since its locks could not be looked at in time; see virtlockctl check, and try again")
)

// Resume continues the owner that is meant, whom this daemon has stopped because a lock was lost, if all of its locks are held: what is
// lost still is taken again first. It may block as long as a disk hangs, and when ctx is done by then it does nothing more.
//
// Errors: ErrNobody, ErrSeveral, ErrNoTime, owner.ErrNotStopped, or why a lock is not held.
func (w *Watcher) Resume(ctx context.Context, meant func(*owner.Owner) bool) (*owner.Details, error) {
	var who *owner.Owner
	err := w.each(func(e *lockspace.Entry) error {
		for _, o := range owners(e.Holds) {
			switch {
			case o == who || !meant(o):
			case who != nil:
				return ErrSeveral
			default:
				who = o
			}
		}
		return nil
	})
	switch {
	case err != nil:
		return nil, err
	case who == nil:
		return nil, ErrNobody
	case !who.Stopped():
		return nil, owner.ErrNotStopped
	}
	err = w.each(func(e *lockspace.Entry) error {
		if !slices.Contains(owners(e.Holds), who) {
			return nil
		}
		if err := w.ensure(e); err != nil {
			return fmt.Errorf("it stays stopped, since its lock on %q is not held: %w", e.Path, err)
		}
		if ctx.Err() != nil {
			return ErrNoTime
		}
		return nil
	})
	if err == nil {
		err = who.Continue()
	}
	if err != nil {
		return nil, err
	}
	w.cfg.Table.NoteOwner(who)
	return who.Details(), nil
}

// each calls do for everything that is held, until it returns an error.
func (w *Watcher) each(do func(*lockspace.Entry) error) error {
	for from, more := 0, true; more; more = from != 0 {
		var entries []lockspace.Entry
		entries, from = w.cfg.Table.List(from, part)
		for i := range entries {
			if err := do(&entries[i]); err != nil {
				return err
			}
		}
	}
	return nil
}

// ensure returns nil if a lock is held, though perhaps on a file that can't be read.
func (w *Watcher) ensure(e *lockspace.Entry) error {
	lost, text, known := verdict(w.cfg.Checker.Check(e))
	switch {
	case !known:
		return errors.New(text)
	case lost == "" && !e.Shared && !e.Exclusive: // after a take-over
		return errors.New("somebody else shares it")
	case lost != "":
		if err := w.regain(e, lost); err != nil && !errors.Is(err, filelock.ErrUnreadable) {
			return fmt.Errorf("%s: %w", text, err)
		}
	}
	return nil
}
