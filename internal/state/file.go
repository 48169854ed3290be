// SPDX-License-Identifier: LGPL-2.1-or-later

package state

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// MaxFile is the size of the largest file that Read reads, in bytes: some million clients.
const MaxFile = 1 << 30

// Write makes the state file, with mode 0600, or leaves path as it was. When it returns, the file has been read
// back and is what data says. fsync is left out: the file lives in memory and no longer than the process.
//
//	open(path.new, O_CREAT|O_EXCL|O_NOFOLLOW), fchmod, write, close
//	rename(path.new, path)
//	open(path), read, compare; unlink(path) if they differ
func Write(path string, data []byte) error {
	if len(data) > MaxFile {
		return fmt.Errorf("cannot write the state file: it would have %d bytes, and no more than %d are read again", len(data), MaxFile)
	}
	if err := write(path+".new", path, data); err != nil {
		return fmt.Errorf("cannot write the state file: %w", err)
	}
	if err := check(path, data); err != nil {
		return errors.Join(fmt.Errorf("cannot write the state file: reading it back: %w", err), Remove(path))
	}
	return nil
}

// check tells why the file at path is not what data says.
func check(path string, data []byte) error {
	f, size, err := open(path, int64(len(data)))
	if err != nil {
		return err
	}
	defer f.Close()
	part := make([]byte, min(256<<10, len(data)+1)) // everybody waits, and new memory takes longer than to read
	for same := size == int64(len(data)); same; {
		n, err := f.Read(part)
		if err == io.EOF && len(data) == 0 {
			return nil
		}
		if err != nil && err != io.EOF {
			return err
		}
		if same = n > 0 && n <= len(data) && bytes.Equal(part[:n], data[:n]); same {
			data = data[n:]
		}
	}
	return &fs.PathError{Op: "read", Path: path, Err: errors.New("the file is not what was written")}
}

func write(temp, path string, data []byte) (err error) {
	// What a daemon left that died here.
	if err := unlink(temp); err != nil {
		return err
	}
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, unlink(temp))
		}
	}()
	if err = f.Chmod(0o600); err == nil { // whatever the umask is
		_, err = f.Write(data)
	}
	if closed := f.Close(); err == nil {
		err = closed
	}
	if err != nil {
		return err
	}
	return os.Rename(temp, path)
}

// Read returns the content of a state file, which must be a regular file that is ours and that nobody else may
// write to. fs.ErrNotExist is in the error's chain if there is none.
func Read(path string) ([]byte, error) {
	data, err := read(path)
	if err != nil {
		return nil, fmt.Errorf("cannot read the state file: %w", err)
	}
	return data, nil
}

// Map is Read for a large file that everybody waits for: it is mapped into memory, which takes a tenth of the time that new
// memory and a copy take. Who makes it shorter ends the process that reads it, but only who could as well end it by a
// signal may write to it. data is valid until release is called.
func Map(path string) (data []byte, release func(), err error) {
	data, release, err = mapped(path)
	if err != nil {
		return nil, func() {}, fmt.Errorf("cannot read the state file: %w", err)
	}
	return data, release, nil
}

func mapped(path string) (data []byte, release func(), err error) {
	f, size, err := open(path, MaxFile)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	if size == 0 {
		return nil, func() {}, nil
	}
	conn, err := f.SyscallConn()
	if err != nil {
		return nil, nil, err
	}
	if ctl := conn.Control(func(fd uintptr) {
		data, err = unix.Mmap(int(fd), 0, int(size), unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_POPULATE)
	}); ctl != nil || err != nil {
		return nil, nil, &fs.PathError{Op: "mmap", Path: path, Err: errors.Join(ctl, err)}
	}
	return data, func() { _ = unix.Munmap(data) }, nil
}

// open opens a file that is as Read says and has at most so many bytes.
func open(path string, most int64) (_ *os.File, size int64, err error) {
	// O_NONBLOCK: a FIFO must not hold us.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	fail := func(format string, a ...any) (*os.File, int64, error) {
		return nil, 0, &fs.PathError{Op: "read", Path: path, Err: fmt.Errorf(format, a...)}
	}
	var st unix.Stat_t
	conn, err := f.SyscallConn()
	if err != nil {
		return nil, 0, err
	}
	if ctl := conn.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &st) }); ctl != nil || err != nil {
		return fail("fstat: %w", errors.Join(ctl, err))
	}
	switch uid := os.Geteuid(); {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return fail("it is not a regular file")
	case int(st.Uid) != uid:
		return fail("it belongs to user %d, not to %d, so it is not ours", st.Uid, uid)
	case st.Mode&0o022 != 0:
		return fail("others may write to it (mode %#o), so it is not ours", st.Mode&0o7777)
	case st.Size > most:
		return fail("it has %d bytes, more than %d", st.Size, most)
	}
	return f, st.Size, nil
}

func read(path string) ([]byte, error) {
	f, size, err := open(path, MaxFile)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fail := func(format string, a ...any) ([]byte, error) {
		return nil, &fs.PathError{Op: "read", Path: path, Err: fmt.Errorf(format, a...)}
	}
	data := make([]byte, size)
	if _, err := io.ReadFull(f, data); err != nil {
		return fail("it has become shorter: %w", err)
	}
	if n, err := f.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		return fail("it has become longer than %d bytes", size)
	}
	return data, nil
}

// Remove removes a state file; one that is not there is fine.
func Remove(path string) error {
	if err := unlink(path); err != nil {
		return fmt.Errorf("cannot remove the state file: %w", err)
	}
	return nil
}

func unlink(path string) error {
	if err := unix.Unlink(path); err != nil && err != unix.ENOENT {
		return &fs.PathError{Op: "unlink", Path: path, Err: err}
	}
	return nil
}
