// SPDX-License-Identifier: LGPL-2.1-or-later

package rpc

import (
	"encoding/hex"
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/internal/xdr"
)

// TestErrors compares with payloads recorded from the C daemon.
func TestErrors(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, want, message string
		err                 *Error
	}{
		{"ordinary", "0000005700000033000000010000003c7265736f7572636520627573793a204c6f636b7370616365207265736f7572636520272f746d702f766c762f6127206973206e6f74206c6f636b6564000000020000000000000001000000117265736f7572636520627573793a202573000000000000010000002d4c6f636b7370616365207265736f7572636520272f746d702f766c762f6127206973206e6f74206c6f636b656400000000000000ffffffffffffffff00000000", "resource busy: Lockspace resource '/tmp/vlv/a' is not locked", Ordinary(CodeResourceBusy, DomainLockspace, "resource busy: %s", "Lockspace resource '/tmp/vlv/a' is not locked")},
		{"protocol", "00000027000000070000000100000020556e61626c6520746f206465636f6465206d657373616765207061796c6f616400000002000000000000000100000002257300000000000100000020556e61626c6520746f206465636f6465206d657373616765207061796c6f616400000000ffffffffffffffff00000000", "Unable to decode message payload", Protocol("Unable to decode message payload")},
		{"flags", "00000008000000070000000100000056756e737570706f7274656420666c6167732028307866666666666666632920696e2066756e6374696f6e207669724c6f636b537061636550726f746f636f6c4469737061746368416371756972655265736f7572636500000000000200000000000000010000002b7669724c6f636b537061636550726f746f636f6c4469737061746368416371756972655265736f75726365000000000100000005666c61677300000000000000000000000000000000000000", "unsupported flags (0xfffffffc) in function virLockSpaceProtocolDispatchAcquireResource", BadFlags("virLockSpaceProtocolDispatchAcquireResource", DomainRPC, 0xfffffffc)},
		{"system", "0000002600000033000000010000003a556e61626c6520746f20637265617465206c6f636b7370616365202f746d702f766c762f662f7375623a204e6f742061206469726563746f727900000000000200000000000000010000000225730000000000010000003a556e61626c6520746f20637265617465206c6f636b7370616365202f746d702f766c762f662f7375623a204e6f742061206469726563746f727900000000000000000014ffffffff00000000", "Unable to create lockspace /tmp/vlv/f/sub: Not a directory", System(DomainLockspace, unix.ENOTDIR, "Unable to create lockspace /tmp/vlv/f/sub: Not a directory")},
		{"admin", "0000005f00000007000000010000002a536572766572206e6f7420666f756e643a204e6f20736572766572206e616d656420276e6f7375636827000000000002000000000000000100000014536572766572206e6f7420666f756e643a20257300000001000000184e6f20736572766572206e616d656420276e6f737563682700000000ffffffffffffffff00000000", "Server not found: No server named 'nosuch'", Ordinary(CodeNoServer, DomainRPC, "Server not found: %s", "No server named 'nosuch'")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if got := hex.EncodeToString(appendError(nil, tt.err)); got != tt.want {
				t.Errorf("payload\n got %s\nwant %s", got, tt.want)
			}
			if tt.err.Error() != tt.message {
				t.Errorf("message %q, want %q", tt.err.Error(), tt.message)
			}
		})
	}
}

func TestErrDecode(t *testing.T) {
	t.Parallel()
	if !errors.Is(ErrDecode, xdr.ErrDecode) {
		t.Error("ErrDecode is none of xdr")
	}
}

// TestOrdinaryVerbs: what a client has named does not act as a template.
func TestOrdinaryVerbs(t *testing.T) {
	t.Parallel()
	e := Ordinary(CodeInternal, DomainRPC, "internal error: %s", "%s%n$1")
	if e.Message != "internal error: %s%n$1" {
		t.Errorf("message %q", e.Message)
	}
}
