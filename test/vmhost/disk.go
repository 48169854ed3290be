// SPDX-License-Identifier: LGPL-2.1-or-later

package vmhost

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// DiskSize is the size of a guest's disk in bytes: enough for the boot sector and for the block jobs to have something to do.
const DiskSize = 1 << 20

// bootSector is the whole operating system of a test's guest. It fills 8 MiB of memory from 1 MiB on, so that a migration has
// something to send, prints "B\n" on the first serial line, and then sleeps until a key is pressed ('r' resets the machine, 'p'
// switches it off) or the power button is (which switches it off). It assumes QEMU's pc machine with SeaBIOS.
var bootSector = []byte{
	0xfa,       // cli
	0x31, 0xc0, // xor ax,ax
	0x8e, 0xd8, // mov ds,ax
	0x8e, 0xd0, // mov ss,ax
	0xbc, 0x00, 0x7c, // mov sp,0x7c00
	0x0f, 0x01, 0x16, 0x77, 0x7c, // lgdt [gdtr]: es is to reach beyond 1 MiB
	0x0f, 0x20, 0xc0, // mov eax,cr0
	0x0c, 0x01, // or al,1
	0x0f, 0x22, 0xc0, // mov cr0,eax
	0xbb, 0x08, 0x00, // mov bx,8
	0x8e, 0xc3, // mov es,bx
	0x24, 0xfe, // and al,0xfe
	0x0f, 0x22, 0xc0, // mov cr0,eax
	0x66, 0xbf, 0x00, 0x00, 0x10, 0x00, // mov edi,0x100000
	0x66, 0xb9, 0x00, 0x00, 0x20, 0x00, // mov ecx,0x200000
	0x66, 0xb8, 0x6c, 0x6f, 0x63, 0x6b, // mov eax,"lock"
	0x67, 0x66, 0xf3, 0xab, // rep stosd
	0x8e, 0xc1, // mov es,cx
	0xfb,             // sti
	0xba, 0x02, 0x06, // mov dx,0x602: ACPI, which events to show
	0xb8, 0x00, 0x01, // mov ax,0x100: the power button
	0xef,             // out dx,ax
	0xba, 0xf8, 0x03, // mov dx,0x3f8: serial line
	0xb0, 'B', // mov al,'B'
	0xee,       // out dx,al
	0xb0, '\n', // mov al,'\n'
	0xee, // out dx,al
	// poll, at 0x4a:
	0xf4,             // hlt: until the next tick
	0xba, 0x00, 0x06, // mov dx,0x600: ACPI, events
	0xed,             // in ax,dx
	0xf6, 0xc4, 0x01, // test ah,1: power button?
	0x75, 0x1a, // jnz off
	0xb4, 0x01, // mov ah,1
	0xcd, 0x16, // int 0x16: a key?
	0x74, 0xf0, // jz poll
	0x30, 0xe4, // xor ah,ah
	0xcd, 0x16, // int 0x16: which?
	0x3c, 'r', // cmp al,'r'
	0x74, 0x06, // je reset
	0x3c, 'p', // cmp al,'p'
	0x74, 0x08, // je off
	0xeb, 0xe2, // jmp poll
	// reset:
	0xb0, 0xfe, // mov al,0xfe
	0xe6, 0x64, // out 0x64,al: by the keyboard controller
	0xeb, 0xdc, // jmp poll
	// off:
	0xba, 0x04, 0x06, // mov dx,0x604: ACPI, power management
	0xb8, 0x00, 0x20, // mov ax,0x2000: sleep state 5
	0xef,       // out dx,ax
	0xeb, 0xd3, // jmp poll
	// gdtr, at 0x77: limit, address of gdt
	0x0f, 0x00, 0x7d, 0x7c, 0x00, 0x00,
	// gdt: none, and all memory as data
	0, 0, 0, 0, 0, 0, 0, 0,
	0xff, 0xff, 0x00, 0x00, 0x00, 0x92, 0xcf, 0x00,
}

// BootDisk returns the contents of a raw disk with which a guest starts.
func BootDisk() []byte {
	disk := make([]byte, DiskSize)
	copy(disk, bootSector)
	disk[510], disk[511] = 0x55, 0xaa
	return disk
}

// A LoopDevice is a block device made of a file. The kernel detaches it as soon as nobody has it open: at Close, or when this
// process and all hosts that use it are gone.
type LoopDevice struct {
	device *os.File
	rdev   int
}

// AttachLoop makes a block device of the file at path.
func AttachLoop(path string) (*LoopDevice, error) {
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	// Somebody else may take the free one first.
	for range 100 {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("find a free loop device: %w", err)
		}
		device, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		conf := unix.LoopConfig{Fd: uint32(file.Fd())}
		conf.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
		err = unix.IoctlLoopConfigure(int(device.Fd()), &conf)
		if err == nil {
			var st unix.Stat_t
			if err := unix.Fstat(int(device.Fd()), &st); err != nil {
				device.Close()
				return nil, err
			}
			return &LoopDevice{device, int(st.Rdev)}, nil
		}
		device.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("attach %s to loop%d: %w", path, n, err)
		}
	}
	return nil, fmt.Errorf("attach %s to a loop device: others were always first", path)
}

// Close gives the device up.
func (l *LoopDevice) Close() error { return l.device.Close() }

// AddDevice makes a node of the device in the host, as path below /dev.
func (h *Host) AddDevice(l *LoopDevice, path string) error {
	if err := unix.Mknod(h.Path(path), unix.S_IFBLK|0o600, l.rdev); err != nil {
		return fmt.Errorf("%s: make %s: %w", h.opts.Name, path, err)
	}
	return nil
}
