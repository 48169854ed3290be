// SPDX-License-Identifier: LGPL-2.1-or-later

// Package daemon makes virtlockd out of its parts: command line, start-up in the right order, signals,
// timeout and an orderly end. It is the only place that knows everyone.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/adminproto"
	"virtlockd/internal/buildinfo"
	"virtlockd/internal/cmdline"
	"virtlockd/internal/conf"
	"virtlockd/internal/events"
	"virtlockd/internal/fdtable"
	"virtlockd/internal/filelock"
	"virtlockd/internal/keeper"
	"virtlockd/internal/lockproto"
	"virtlockd/internal/lockspace"
	"virtlockd/internal/logging"
	"virtlockd/internal/owner"
	"virtlockd/internal/pidfile"
	"virtlockd/internal/poll"
	"virtlockd/internal/rpc"
	"virtlockd/internal/state"
	"virtlockd/internal/systemd"
	"virtlockd/internal/vault"
	"virtlockd/internal/verify"
	"virtlockd/internal/watch"
)

// Exit codes, as the C daemon has them. The others it has belong to the live upgrade.
const (
	exitOK      = 0
	exitUsage   = 1 // command line, configuration, pid file; also an end that left something behind
	exitRunDir  = 2
	exitNetwork = 6
)

// startError is why the daemon can't start, and the exit code that says so.
type startError struct {
	code int
	err  error
}

func (e *startError) Error() string { return e.err.Error() }
func (e *startError) Unwrap() error { return e.err }

// exitCode is the exit code for an error of the start.
func exitCode(err error) int {
	var s *startError
	if errors.As(err, &s) {
		return s.code
	}
	return exitUsage
}

const (
	// stopTime bounds the end: a disk that hangs must not keep the host from shutting down.
	stopTime = 5 * time.Second
	// serverTime is how much of it clients get whose request is under way.
	serverTime = 2 * time.Second
	// gcPercent is the run-time's own. With less there are more collections, each of which takes a processor from those who wait; with
	// more the heap has holes afterwards that can't be given back. GOGC and GOMEMLIMIT don't count.
	gcPercent = 100
	// usualFDs is for how many descriptors there is room from the start: those of some two hundred guests. A live upgrade looks at all of
	// the table, so it is not larger.
	usualFDs = 1 << 10
	// lull is how long those who have waited for a live upgrade have the processors for themselves afterwards.
	lull = 20 * time.Millisecond
	// flushTime bounds the wait for log outputs that are slow to take the last lines.
	flushTime = time.Second
)

// Names of the two servers, as virt-admin shows them.
const (
	lockServer  = "virtlockd"
	adminServer = "admin"
)

// Main runs the daemon with the command line args (with the program's name first) and returns its exit
// code.
func Main(args []string) int {
	settle()
	link := keeper.Kept()
	stage, waiting := detachStage()
	if stage == goBetween {
		return mediate(args, waiting)
	}
	signals := catchSignals()
	defer signals.release()

	name := "virtlockd"
	if len(args) > 0 {
		if args[0] != "" {
			name = args[0]
		}
		args = args[1:]
	}
	p := findPaths(os.Geteuid(), os.Getenv)
	o, err := parseOptions(args)
	var usage *cmdline.UsageError
	// Before everything else that could end the process: it may hold all the locks already. A
	// question is not meant for it.
	var left legacy
	if p.err == nil && !errors.Is(err, errHelp) && !errors.Is(err, errVersion) {
		left = findLegacy(p)
	}
	if !left.served {
		<-signals.caught // before anything is made that would be left behind
	}
	kept := left.served || vaultPassed()
	switch {
	case kept: // it was detached before, and its command line was good enough
	case errors.Is(err, errHelp):
		printUsage(os.Stderr, name, p)
		return exitOK
	case errors.Is(err, errVersion):
		printVersion(os.Stdout, name)
		return exitOK
	case errors.As(err, &usage):
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		printUsage(os.Stderr, name, p)
		return exitUsage
	case err == nil && o.detach && stage == 0 && link == nil:
		signals.release() // who waits can be interrupted
		if err := detach(os.Args); err != nil {
			fmt.Fprintf(os.Stderr, "%s: error: %v\n", name, err)
			return exitCode(err)
		}
		return exitOK
	}
	var noKeeper error
	if err == nil && link == nil && o.wantsKeeper() && !kept {
		noKeeper = keeper.Run(keeperConfig(waiting)) // this process becomes it
	}
	if link != nil && link.Report >= 0 && isPipe(link.Report) {
		waiting = &reporter{link.Report}
	}

	d := &daemon{
		name: name, options: o, paths: p, signals: signals, waiting: waiting,
		notify: systemd.NewNotifier(), asked: make(chan struct{}, 1),
		left: left, startTime: time.Now().UnixNano(), cause: "live upgrade: ",
	}
	d.safety.link, d.safety.why, d.safety.again = link, noKeeper, make(chan struct{}, 1)
	return d.main(err)
}

// settle makes the process independent of how it was started: settings of the Go run-time are for
// developers, and what happens to be in the environment must not change how a lock daemon works.
func settle() {
	// The run-time has read GODEBUG already, so only a new start gets rid of it; the process stays
	// the same.
	if _, ok := os.LookupEnv("GODEBUG"); ok {
		os.Unsetenv("GODEBUG")
		_ = syscall.Exec(selfPath(), os.Args, os.Environ()) // if it fails, we live with it
	}
	// Nothing is collected until we serve: there is no garbage yet, and everybody waits.
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(math.MaxInt64)
	// A thread waits for each call on a local disk that does not answer. The run-time's own limit, 10,000,
	// ends the process; what bounds them here is max_clients.
	debug.SetMaxThreads(math.MaxInt32)
	// Not the number of the machine's. Whoever sits in a system call keeps one: a goroutine or two that wait
	// for events, and the one that watches them. With none to spare the run-time takes them back all the time.
	runtime.GOMAXPROCS(4)
	raiseFileLimit()
	// The first timer makes the run-time open descriptors of its own, and without room for them it ends the process without a word about
	// why: a recovery at the limit of open files has to be able to say that.
	time.AfterFunc(time.Hour, func() {}).Stop()
}

// raiseFileLimit raises the limit of open files as far as we may: each client and each lock needs one.
// Go raises it too, but puts the old limit back before exec(2), unless it was set by hand.
func raiseFileLimit() {
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) == nil {
		l.Cur = l.Max
		unix.Setrlimit(unix.RLIMIT_NOFILE, &l)
	}
}

// daemon is one run. Fields are set by start, in its order, and don't change afterwards.
type daemon struct {
	name    string
	options options
	paths   paths
	signals *signals
	waiting *reporter // who waits for the end of the start; nil: nobody
	notify  systemd.Notifier
	undo    []func() // of start's steps, in their order

	safety    safety
	cause     string    // of a take-over, as its log lines begin: of a live upgrade or a recovery
	found     *recovery // in the vault of a process that has died; nil: this one is not such a one's successor
	left      legacy    // of another binary in this process
	strays    bool      // not all of it could be taken over
	unknown   []int32   // descriptors that nobody knows of, see dismissStrays
	startTime int64     // of the first one, in ns since the epoch
	upgrades  uint64    // how many have handed over
	// recoveries is how many processes have taken over from one that had died.
	recoveries uint64
	leaves     bool // the process ends and leaves everything to the next one
	// configured are the log settings as the command line and the configuration have them; the admin protocol
	// changes others.
	configured atomic.Pointer[logging.Settings]
	limits     atomic.Pointer[conf.Settings] // as they were read last

	startDir     string // where relative names on the command line and in the configuration count from
	configFile   string // absolute, or "" as given
	logs         *logging.Logs
	log          *slog.Logger
	pidFile      *pidfile.File
	poller       *poll.Poller
	files        *filelock.Files
	owners       *owner.Registry
	events       *events.Log
	noted        atomic.Uint64 // what was locked when the note of that was written, see lockspace.Table.Serial
	noting       sync.Mutex    // held while that is written, and while it must not be; nobody waits for it
	checker      *verify.Checker
	watcher      *watch.Watcher
	table        *lockspace.Table
	locks        *lockproto.Program
	adminProgram *adminproto.Program
	sockets      sockets
	lock         *rpc.Server
	admin        *rpc.Server
	idle         *idler
	asked        chan struct{} // the admin protocol wants the daemon to end
	preserve     atomic.Bool   // and that everything outlives it
}

// main runs from after the command line, whose fault (or nil) is given, to the end.
func (d *daemon) main(fault error) int {
	if err := d.start(fault); err != nil {
		d.complain(err)
		if d.found != nil {
			d.closeLogs() // pid file and sockets are the next process's, which takes over what this one could not
		} else {
			d.clean()
		}
		d.waiting.report(exitCode(err), err.Error()) // nothing is left by now
		return exitCode(err)
	}
	code, ended := d.serve()
	switch {
	case d.leaves:
		d.closeLogs() // all else is the next process's
	case ended:
		d.clean()
	default:
		// What still runs can't be waited for and may use everything but these; it ends with the
		// process, and so do its locks.
		d.removePIDFile()
		d.closeLogs()
	}
	return code
}

// clean undoes what start did, as far as it got.
func (d *daemon) clean() {
	for _, f := range slices.Backward(d.undo) {
		f()
	}
}

// complain says why the daemon can't start: to the log, and to stderr if the log doesn't go there.
func (d *daemon) complain(err error) {
	if d.log != nil {
		d.log.Error(err.Error())
		for _, o := range d.logs.Settings().Outputs {
			if o.Dest == logging.Stderr {
				return
			}
		}
	}
	fmt.Fprintf(os.Stderr, "%s: error: %v\n", d.name, err)
}

// start does all that comes before the first client. The order has reasons:
//
//   - the log first, because everything else may have something to say;
//   - configuration before anything is touched: a bad file changes nothing on the host;
//   - the pid file before the sockets: a second instance ends before it gets near them;
//   - the lock table before the sockets, so that no client is ever accepted by a daemon that can't
//     lock;
//   - READY=1 and the waiting parent last: who starts a guest then finds us serving.
func (d *daemon) start(fault error) (err error) {
	undo := func(f func()) { d.undo = append(d.undo, f) }
	env := logging.EnvFrom(os.Getenv)
	early := logging.Early(env, d.options.verbose)
	d.configured.Store(&early)
	d.logs, err = logging.New(logging.Config{
		Version: buildinfo.LibvirtVersion,
		Package: buildinfo.Product + " " + buildinfo.Version,
	}, early)
	if err != nil {
		return err
	}
	undo(d.closeLogs)
	d.log = d.category("locking.lock_daemon")
	passed, passedErr := systemd.Descriptors(os.Getpid())
	roots, passed := vaultRoots(passed)
	if d.found, err = d.recoverVault(roots); err != nil {
		return err
	}
	if d.found != nil { // whatever a state file says: a root is passed to a new process only
		d.cause = "recovery: "
		d.left = legacy{snapshot: d.found.snapshot, served: true, inherited: opened(d.found.snapshot)}
	}
	d.safety.store = storeNotifier(d.notify, d.paths)
	d.meetKeeper()
	resume := d.left.snapshot
	if d.startDir, err = os.Getwd(); err != nil {
		err = fmt.Errorf("the working directory can't be told: %w", err)
		if !d.left.served {
			return err
		}
		d.log.Error(d.cause+"relative names count from / now", "error", err)
		d.startDir = "/"
		if err := os.Chdir("/"); err != nil {
			d.log.Error(d.cause+"there is no working directory", "error", err)
		}
	}
	if resume != nil && resume.StartDir != "" {
		d.startDir = resume.StartDir
	}
	// tolerate is for steps without which a daemon that has locks already had better go on.
	tolerate := func(err error) error {
		if err == nil || !d.left.served {
			return err
		}
		d.log.Error(d.cause+"something is amiss that would end a daemon at its start; this one goes on for the sake of its locks", "error", err)
		return nil
	}
	if fault = tolerate(fault); fault != nil {
		return fault
	}
	if d.paths.err != nil {
		return d.paths.err
	}
	for _, arg := range d.options.ignored {
		d.log.Warn("a command line argument that is no option means nothing and is ignored", "argument", arg)
	}

	<-d.signals.caught // a SIGHUP that comes from here on is not lost, and what the one before would read is read now
	settings, err := d.configure()
	if err = tolerate(err); err != nil {
		return err
	}
	d.tellKept()
	if d.left.err != nil {
		d.log.Warn("the state file of an earlier daemon is of no use; nothing was taken over", "file", d.paths.stateFile, "error", d.left.err)
	}
	if settings.MaxClients == 0 { // tolerated: limits come with the state file, if it has them
		settings = conf.Defaults()
		if resume != nil && resume.Configured[0] != 0 {
			settings.MaxClients, settings.AdminMaxClients = resume.Configured[0], resume.Configured[1]
		}
		d.limits.Store(&settings)
	}

	if err := tolerate(d.paths.makeRunDir()); err != nil {
		return err
	}
	if resume != nil {
		d.adoptPIDFile(resume)
	} else if d.pidFile, err = d.acquirePIDFile(); tolerate(err) != nil {
		return err
	}
	undo(d.removePIDFile)
	if d.options.detach {
		// No file system is kept from being unmounted; relative names that clients send are
		// looked up from here, as with the C daemon.
		if err := os.Chdir("/"); err != nil {
			return err
		}
	}

	if d.poller, err = d.adoptPoller(resume); err != nil {
		return err
	}
	undo(d.poller.Close)
	if d.files, err = filelock.New(filelock.Config{Logger: d.category("util.lockspace"), Waiting: d.poller.Waiting}); err != nil {
		return err
	}
	undo(func() { d.files.Close() })
	d.idle = newIdler(d.options.timeout, d.busy)
	d.events = events.New()
	d.table = lockspace.New(lockspace.Config{
		Locker:  d.files,
		Logger:  d.category("util.lockspace"),
		Events:  d.events,
		Changed: d.idle.changed,
		Waiting: d.poller.Waiting,
	})
	d.owners = owner.NewRegistry(owner.Config{
		Poller: d.poller,
		Logger: d.category("locking.lock_daemon"),
		Events: d.events,
		Died:   d.table.ReleaseOwner,
	})
	undo(d.owners.Close)
	d.locks = lockproto.New(lockproto.Config{
		Table:  d.table,
		Owners: d.owners,
		Logger: d.category("locking.lock_daemon_dispatch"),
	})
	d.lock = rpc.NewServer(d.poller, rpc.Config{
		Name:       lockServer,
		Setting:    "max_clients",
		MaxClients: settings.MaxClients,
		MaxUnauth:  settings.MaxClients,
		MaxMessage: lockproto.MaxMessage,
		AllowUID:   d.paths.uid,
		Programs:   []rpc.Program{d.locks},
		Logger:     d.category("rpc.netserver"),
		Changed:    d.idle.changed,
		Describe:   d.locks.Describe,
	})
	version, err := buildinfo.LibvirtNumber()
	if err != nil {
		return err
	}
	d.adminProgram = adminproto.New(adminproto.Config{
		Servers:    d.servers,
		Logs:       d.logs,
		Guards:     d.locks.Guards,
		SetTimeout: func(seconds uint32) { d.idle.setTimeout(time.Duration(seconds) * time.Second) },
		Changed:    d.storeSettings,
		Shutdown:   d.shutdown,
		LibVersion: version,
		Logger:     d.category("admin"),
	})
	d.admin = rpc.NewServer(d.poller, rpc.Config{
		Name:       adminServer,
		Setting:    "admin_max_clients",
		MaxClients: settings.AdminMaxClients,
		MaxUnauth:  settings.AdminMaxClients,
		MaxMessage: adminproto.MaxMessage,
		AllowUID:   d.paths.uid,
		Programs:   append([]rpc.Program{d.adminProgram}, d.inspection()...),
		Logger:     d.category("rpc.netserver"),
		Changed:    d.idle.changed,
		Describe:   func(_ *rpc.Client, into *vault.Client) { into.Admin = true },
	})

	if resume != nil {
		d.takeOver(resume, d.left.problems)
		d.adoptListeners(resume, passed)
		d.dismissStrays(d.left.inherited)
		undo(d.forgetNote)
		undo(d.forsake)
		d.followConfigSince(resume)
		d.storeSettings()
		d.left, d.found = legacy{}, nil // they can be large
		undo(d.unlinkSockets)
		return nil
	}
	if passedErr != nil {
		return &startError{exitNetwork, passedErr}
	}
	d.dismissStrays(findInherited(fdtable.Size()))
	if d.sockets, err = openSockets(d.paths, passed); err != nil {
		return err
	}
	undo(d.unlinkSockets)
	d.readNote()
	undo(d.forgetNote)
	d.makeSafe()
	undo(d.forsake)
	d.storeSettings()
	if d.sockets.lock == nil {
		d.log.Warn("socket activation passed no lock socket: guests can't be locked; enable " + lockUnit)
	}
	return nil
}

// wait returns true after that time, or false when ctx is done.
func wait(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

func (d *daemon) category(name string) *slog.Logger {
	return d.logs.Logger().With(logging.Category, name)
}

// loadConfig reads the configuration and what the environment and the command line make of it.
func (d *daemon) loadConfig() (conf.Settings, logging.Settings, error) {
	settings, err := conf.LoadSettings(d.configFile, d.options.config == nil)
	if err != nil {
		return conf.Settings{}, logging.Settings{}, fmt.Errorf("Can't load config file: %w", err) //lint:ignore ST1005 the C daemon's text
	}
	log, err := d.resolveLogs(settings)
	return settings, log, err
}

// resolveLogs returns what the environment and the command line make of the configured log settings.
func (d *daemon) resolveLogs(settings conf.Settings) (logging.Settings, error) {
	_, ttyErr := unix.IoctlGetTermios(0, unix.TCGETS)
	log, err := logging.Resolve(logging.EnvFrom(os.Getenv), settings, d.options.verbose, logging.Mode{
		Daemon:   d.options.detach,
		StdinTTY: ttyErr == nil,
		Journald: logging.JournaldPresent(""),
		File:     d.paths.logFile,
		Dir:      d.startDir,
	})
	if err != nil {
		return logging.Settings{}, sourced(err)
	}
	return log, nil
}

// sourced puts the place of a wrong log setting before what is wrong with it.
func sourced(err error) error {
	var invalid *logging.InvalidError
	if errors.As(err, &invalid) && invalid.Source != "" {
		return fmt.Errorf("%s: %w", invalid.Source, err)
	}
	return err
}

// apply puts log settings into force; on error nothing has changed.
func (d *daemon) apply(settings conf.Settings, log logging.Settings) error {
	for _, o := range log.Outputs {
		if o.Dest == logging.File && o.Arg == d.paths.logFile {
			// If this fails, opening the file says so.
			_ = makeDir(filepath.Dir(o.Arg), d.paths.dirMode())
		}
	}
	if err := d.logs.Apply(log); err != nil {
		return err
	}
	d.configured.Store(&log)
	for _, e := range settings.Unknown() {
		d.log.Warn("an unknown key in the configuration is ignored", "file", d.configFile, "line", e.Line, "key", e.Name)
	}
	return nil
}

// configure reads the configuration at the start.
func (d *daemon) configure() (conf.Settings, error) {
	d.configFile = d.paths.config
	if c := d.options.config; c != nil {
		d.configFile = d.absolute(*c)
	}
	settings, log, err := d.loadConfig()
	if err != nil {
		if d.left.served { // it goes on without, and says so where its log usually is
			settings = conf.Defaults()
			if log, again := d.resolveLogs(settings); again == nil {
				_ = d.apply(settings, log) // else the log stays where it began
			}
		}
		return conf.Settings{}, err
	}
	d.limits.Store(&settings)
	return settings, d.apply(settings, log)
}

// setLimits puts the configured limits into force.
func (d *daemon) setLimits(settings conf.Settings) {
	d.limits.Store(&settings)
	d.lock.SetLimits(rpc.Limits{MaxClients: settings.MaxClients, MaxUnauth: settings.MaxClients})
	d.admin.SetLimits(rpc.Limits{MaxClients: settings.AdminMaxClients, MaxUnauth: settings.AdminMaxClients})
	d.storeSettings()
}

// followConfig puts the limits of the configuration into force if they have changed there: else they go on as they are, since an
// administrator may have set them.
func (d *daemon) followConfig(settings conf.Settings) {
	if last := d.limits.Load(); settings.MaxClients != last.MaxClients || settings.AdminMaxClients != last.AdminMaxClients {
		d.setLimits(settings)
	}
}

// followConfigSince is followConfig for a configuration that has changed since another process or binary read it.
func (d *daemon) followConfigSince(s *state.Snapshot) {
	if s.Configured[0] == 0 {
		return
	}
	now := *d.limits.Load()
	last := now
	last.MaxClients, last.AdminMaxClients = s.Configured[0], s.Configured[1]
	d.limits.Store(&last)
	d.followConfig(now)
}

// reload reads the configuration again and opens log files anew, for SIGHUP. A bad file changes nothing.
func (d *daemon) reload() {
	settings, log, err := d.loadConfig()
	if err == nil {
		err = d.apply(settings, log)
	}
	if err != nil {
		d.log.Error("SIGHUP: the configuration is not usable, the settings in force stay as they are", "error", err)
	} else {
		d.setLimits(settings)
	}
	if again := d.logs.Reopen(); again != nil {
		d.log.Error("SIGHUP: a log file can't be opened anew", "error", again)
	} else if err == nil {
		d.log.Info("SIGHUP: configuration read, log files opened anew")
	}
}

// shutdown is what the admin protocol's call of that name asks for. Unlike a signal it doesn't give up
// locks. To preserve them is possible where they outlive the process: systemd starts the next one at once.
func (d *daemon) shutdown(preserve bool) (begin func(), err error) {
	if preserve && d.safety.keeper() == nil && d.safety.flaw() == nil {
		d.preserve.Store(true)
	} else if n := d.table.Retire(); n > 0 {
		return nil, &adminproto.LocksHeldError{Locks: n}
	}
	return func() {
		select {
		case d.asked <- struct{}{}:
		default: // asked for already
		}
	}, nil
}

// absolute makes a name from the command line good for the time after chdir. "" stays what it is, no
// name at all.
func (d *daemon) absolute(path string) string {
	if path == "" || filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(d.startDir, path)
}

// pidFilePath returns the path of the pid file, "" if none is wanted.
func (d *daemon) pidFilePath() string {
	if p := d.options.pidFile; p != nil {
		return d.absolute(*p)
	}
	return d.paths.pidFile
}

// acquirePIDFile writes the pid file; nil without error: none is wanted.
func (d *daemon) acquirePIDFile() (*pidfile.File, error) {
	path := d.pidFilePath()
	if path == "" {
		return nil, nil
	}
	return pidfile.Acquire(path)
}

func (d *daemon) removePIDFile() {
	if d.pidFile == nil {
		return
	}
	if err := d.pidFile.Remove(); err != nil {
		d.log.Warn("the pid file was left behind", "error", err)
	}
}

func (d *daemon) closeLogs() {
	ctx, cancel := context.WithTimeout(context.Background(), flushTime)
	defer cancel()
	d.logs.Close(ctx)
}

func (d *daemon) unlinkSockets() {
	for _, s := range d.sockets.all() {
		s.unlink(d.log)
	}
}

// busy tells whether somebody needs us: a client, one that waits to be accepted, or the holder of a
// lock.
func (d *daemon) busy() bool {
	if d.lock.Count() > 0 || d.admin.Count() > 0 || d.table.Held() > 0 {
		return true
	}
	for _, s := range d.sockets.all() {
		if poll.Now(s.fd, unix.POLLIN)&unix.POLLIN != 0 {
			return true
		}
	}
	return false
}

// serve accepts clients until a signal, the timeout or a failure ends it. It returns the exit code, and
// whether everything has ended that was begun.
func (d *daemon) serve() (code int, ended bool) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()

	failed := make(chan error, 1)
	go func() {
		// Not ctx: clients are served until stop is through with them.
		if err := d.poller.Run(context.Background()); err != nil {
			failed <- err
		}
	}()
	for _, l := range []struct {
		server *rpc.Server
		socket *socket
	}{{d.lock, d.sockets.lock}, {d.admin, d.sockets.admin}} {
		if l.socket == nil {
			continue
		}
		if err := l.server.Listen(l.socket.fd); err != nil {
			err = &startError{exitNetwork, fmt.Errorf("cannot serve socket '%s': %w", l.socket.path, err)}
			if d.upgrades > 0 || d.table.Held() > 0 {
				d.log.Error(d.cause+"new clients have to wait for a restart; locks are kept", "error", err)
				continue
			}
			d.complain(err)
			d.waiting.report(exitCode(err), err.Error())
			return exitCode(err), d.stop()
		}
	}
	var idle sync.WaitGroup
	idle.Go(func() { fdtable.Reserve(usualFDs) })
	idle.Go(func() { d.keepNote(ctx) })
	idle.Go(func() { d.idle.run(ctx) })
	idle.Go(func() {
		if !wait(ctx, lull) {
			return
		}
		debug.SetGCPercent(gcPercent)
		d.table.Confirm(func(path string, holder *owner.Owner, found filelock.Finding) { d.tellFinding(path, holder, found, 0) })
		d.strengthen(ctx.Done())
	})
	go d.watcher.Run(ctx) // nobody waits for it: it may wait for a disk
	// On a goroutine of its own: a configuration on a disk that hangs must not delay the end.
	go func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-d.signals.reload:
				d.signals.reloading.Store(true)
				d.reload()
				d.signals.reloading.Store(false)
			}
		}
	}()

	d.tellSystemd("READY=1")
	d.waiting.report(exitOK, "")

	go d.guard(ctx)
	signalled, broken := false, false
	upgrade := d.signals.upgrade // nil while one is being prepared; the next one waits
	prepared := make(chan *successor, 1)
	for {
		select {
		case s := <-d.signals.stop:
			signalled = true
			d.log.Info("the daemon ends, as a signal asks for", "signal", s.String())
		case <-d.asked:
			d.log.Info("the daemon ends, as an administrator asks for")
		case <-d.idle.expired:
			if d.table.Retire() > 0 {
				continue // somebody was faster; from here on nobody is
			}
			d.log.Info("the daemon ends: nobody has needed it for the time of --timeout")
		case err := <-failed:
			d.log.Error("the daemon ends: it can't wait for clients any more", "error", err)
			code, broken = exitUsage, true
		case <-upgrade:
			upgrade = nil
			go func() { prepared <- d.prepareUpgrade(ctx) }()
			continue
		case next := <-prepared:
			if next != nil {
				d.handOver(next)
			}
			upgrade = d.signals.upgrade
			continue
		}
		break
	}
	if broken && d.safety.outlivesCrash() {
		d.leaves = true // as one that was killed
		return code, false
	}
	if (signalled || d.preserve.Load()) && d.leave() {
		return code, false
	}
	cancel()
	idle.Wait() // it looks at the sockets, which are closed now
	if !d.stop() {
		return exitUsage, false
	}
	return code, true
}

// stop gives everything up: no more clients, then the locks. No guest is ended because we stop. It
// returns false if something didn't end in time.
func (d *daemon) stop() bool {
	limit := time.NewTimer(stopTime)
	defer limit.Stop()
	d.tellSystemd("STOPPING=1")
	d.owners.Close()
	d.unlinkSockets()
	clients := make(chan struct{})
	go func() {
		defer close(clients)
		var servers sync.WaitGroup
		servers.Go(d.lock.Shutdown)
		servers.Go(d.admin.Shutdown)
		servers.Wait()
	}()
	select {
	case <-clients:
	case <-time.After(serverTime):
		// A request hangs. Its lock, should it ever get one, goes with this process.
	}
	locks := make(chan struct{})
	go func() {
		defer close(locks)
		d.table.Close()
	}()
	select {
	case <-locks:
	case <-limit.C:
	}
	if isClosed(clients) && isClosed(locks) {
		return true
	}
	for _, c := range d.files.InFlight() {
		d.log.Error("a call on a disk didn't end before the daemon did; its lock goes with the process, a lease file may be left",
			"call", c.Op, "path", c.Path, "mount", c.Mount, "worker", c.Worker, "for", time.Since(c.Since).Round(time.Millisecond))
	}
	return false
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
