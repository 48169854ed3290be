// SPDX-License-Identifier: LGPL-2.1-or-later

package adminproto

import (
	"fmt"
	"slices"
	"strings"

	"virtlockd/internal/rpc"
	"virtlockd/internal/xdr"
)

// kind is the type of a typed parameter, as libvirt numbers them.
type kind uint32

const (
	kindInt     kind = 1
	kindUint    kind = 2
	kindLlong   kind = 3
	kindUllong  kind = 4
	kindDouble  kind = 5
	kindBoolean kind = 6
	kindString  kind = 7
)

func (k kind) String() string {
	return [...]string{"unknown", "int", "uint", "llong", "ullong", "double", "boolean", "string"}[k]
}

// maxField bounds a parameter's name, in bytes: the size of libvirt's buffer without its NUL.
const maxField = 79

// param is one typed parameter of a call. All that can be set is of kindUint, so no other value is
// kept.
type param struct {
	field string
	kind  kind
	value uint32
}

// decodeParams consumes a list of parameters. It returns false for one of an unknown kind, whose
// length nobody knows; other failures are the decoder's.
func decodeParams(d *xdr.Decoder) ([]param, bool) {
	n := d.Count(maxParams)
	params := make([]param, 0, n)
	for range n {
		p := param{field: d.String(maxString), kind: kind(d.Uint32())}
		switch p.kind {
		case kindUint:
			p.value = d.Uint32()
		case kindInt, kindBoolean:
			d.Uint32()
		case kindLlong, kindUllong, kindDouble:
			d.Uint64()
		case kindString:
			d.StringBytes(maxString)
		default:
			return nil, false
		}
		params = append(params, p)
	}
	return params, true
}

// checkNames refuses parameters whose name is too long for libvirt.
func checkNames(params []param) error {
	for _, p := range params {
		if len(p.field) > maxField {
			return rpc.Ordinary(rpc.CodeInternal, rpc.DomainNone, internalError,
				fmt.Sprintf("parameter %s too big for destination", p.field))
		}
	}
	return nil
}

// values returns the value of each parameter, all of which must be known, of kindUint, and there
// once. The parameters are looked at in the order of their names, so the same message always gets
// the same error.
func values(params []param, known ...string) (map[string]uint32, error) {
	sorted := slices.Clone(params)
	slices.SortStableFunc(sorted, func(a, b param) int { return strings.Compare(a.field, b.field) })
	v := make(map[string]uint32, len(known))
	for _, p := range sorted {
		if !slices.Contains(known, p.field) {
			return nil, rpc.Ordinary(rpc.CodeArgumentUnsupported, rpc.DomainNone, unsupported,
				fmt.Sprintf("parameter '%s' not supported", p.field))
		}
		if _, twice := v[p.field]; twice {
			return nil, rpc.Ordinary(rpc.CodeInvalidArg, rpc.DomainNone, invalidArgument,
				fmt.Sprintf("parameter '%s' occurs multiple times", p.field))
		}
		if p.kind != kindUint {
			return nil, rpc.Ordinary(rpc.CodeInvalidArg, rpc.DomainNone, invalidArgument,
				fmt.Sprintf("invalid type '%s' for parameter '%s', expected '%s'", p.kind, p.field, kindUint))
		}
		v[p.field] = p.value
	}
	return v, nil
}

func appendUints(b []byte, params ...param) []byte {
	b = xdr.AppendUint32(b, uint32(len(params)))
	for _, p := range params {
		b = appendField(b, p.field, kindUint)
		b = xdr.AppendUint32(b, p.value)
	}
	return b
}

func appendField(b []byte, field string, k kind) []byte {
	return xdr.AppendUint32(xdr.AppendString(b, field), uint32(k))
}
