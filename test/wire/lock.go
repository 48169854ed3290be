// SPDX-License-Identifier: LGPL-2.1-or-later

package wire

// Procedures of the lock program.
const (
	ProcRegister        uint32 = 1
	ProcRestrict        uint32 = 2
	ProcNew             uint32 = 3
	ProcCreateResource  uint32 = 4
	ProcDeleteResource  uint32 = 5
	ProcAcquire         uint32 = 6
	ProcRelease         uint32 = 7
	ProcCreateLockspace uint32 = 8
)

// Flags of ACQUIRE_RESOURCE.
const (
	Shared     uint32 = 1
	Autocreate uint32 = 2
)

// Owner is what REGISTER tells of a virtual machine.
type Owner struct {
	UUID  [16]byte
	Name  string
	ID    uint32
	PID   uint32
	Flags uint32
}

// VM returns an owner that libvirt would accept, for a process.
func VM(pid int) Owner {
	o := Owner{Name: "vm", ID: 1, PID: uint32(pid)}
	for i := range o.UUID {
		o.UUID[i] = 0x11
	}
	return o
}

// RegisterArgs are the arguments of REGISTER.
func RegisterArgs(o Owner) []byte {
	return Payload(nil).Bytes(o.UUID[:]...).String(o.Name).Uint32(o.ID).Uint32(o.PID).Uint32(o.Flags)
}

// FlagsArgs are the arguments of RESTRICT.
func FlagsArgs(flags uint32) []byte { return Payload(nil).Uint32(flags) }

// PathArgs are the arguments of NEW.
func PathArgs(path string, flags uint32) []byte { return Payload(nil).String(path).Uint32(flags) }

// LockspaceArgs are the arguments of CREATE_LOCKSPACE.
func LockspaceArgs(path string) []byte { return Payload(nil).String(path) }

// ResourceArgs are the arguments of the four calls on a resource.
func ResourceArgs(lockspace, name string, flags uint32) []byte {
	return Payload(nil).String(lockspace).String(name).Uint32(flags)
}

// Request returns the whole frame of a call of the lock program.
func Request(proc, serial uint32, args []byte) []byte {
	return Frame(Header{Program: LockProgram, Version: Version, Proc: proc, Type: TypeCall, Serial: serial}, args)
}

// Register calls REGISTER. This and the calls below return nil for success, an *Error for an error reply.
func (c *Conn) Register(o Owner) error { return c.call(ProcRegister, RegisterArgs(o)) }

// Restrict calls RESTRICT.
func (c *Conn) Restrict() error { return c.call(ProcRestrict, FlagsArgs(0)) }

// New calls NEW.
func (c *Conn) New(path string) error { return c.call(ProcNew, PathArgs(path, 0)) }

// CreateLockspace calls CREATE_LOCKSPACE.
func (c *Conn) CreateLockspace(path string) error {
	return c.call(ProcCreateLockspace, LockspaceArgs(path))
}

// Create calls CREATE_RESOURCE.
func (c *Conn) Create(lockspace, name string) error {
	return c.call(ProcCreateResource, ResourceArgs(lockspace, name, 0))
}

// Delete calls DELETE_RESOURCE.
func (c *Conn) Delete(lockspace, name string) error {
	return c.call(ProcDeleteResource, ResourceArgs(lockspace, name, 0))
}

// Acquire calls ACQUIRE_RESOURCE.
func (c *Conn) Acquire(lockspace, name string, flags uint32) error {
	return c.call(ProcAcquire, ResourceArgs(lockspace, name, flags))
}

// Release calls RELEASE_RESOURCE.
func (c *Conn) Release(lockspace, name string) error {
	return c.call(ProcRelease, ResourceArgs(lockspace, name, 0))
}
