// SPDX-License-Identifier: LGPL-2.1-or-later

package rpc

// Program is one set of procedures, under a program number and a version. Its
// methods are called on several goroutines at once, but for one client never
// more than one at a time.
type Program interface {
	// ID returns the numbers that calls are dispatched by.
	ID() (program, version uint32)

	// Call executes one procedure and appends the reply's payload to out. args
	// and out belong to the server again when it returns. It may block: that
	// holds up this client alone; Client.Done tells that the answer is not
	// wanted any more.
	//
	// *Error becomes an error reply, ErrNoProc and ErrDecode (or
	// xdr.ErrDecode) the ones the protocol has for them, and any other error an
	// internal error with its text.
	Call(c *Client, proc uint32, args, out []byte) ([]byte, error)

	// Undo says that the reply to the client's last Call could not be
	// delivered, because the peer was gone or we close the connection. Closed
	// follows. It may block.
	Undo(c *Client)

	// Closed is called once for each client, after a running Call has ended.
	// byPeer tells that the peer hung up; else we closed the connection
	// (protocol error, administrator, shutdown). The descriptor is closed
	// already. It must not block: others' disconnects wait for it. What can
	// block belongs on a goroutine of its own.
	Closed(c *Client, byPeer bool)
}

// Opener is implemented by a Program that wants to know of each client that was
// accepted, before its first Call. Opened must not block: it runs on the
// goroutine that accepts.
type Opener interface {
	Opened(c *Client)
}
