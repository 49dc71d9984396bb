package metrics

import (
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// fill gives each field of a message another number, and each list one element.
func fill(m protoreflect.Message, next *uint64) {
	for i := range m.Descriptor().Fields().Len() {
		f := m.Descriptor().Fields().Get(i)
		*next++
		switch {
		case f.IsList():
			e := m.Mutable(f).List().AppendMutable()
			fill(e.Message(), next)
		case f.Kind() == protoreflect.MessageKind:
			fill(m.Mutable(f).Message(), next)
		case f.Kind() == protoreflect.StringKind:
			m.Set(f, protoreflect.ValueOfString(string(f.Name())))
		case f.Kind() == protoreflect.DoubleKind:
			m.Set(f, protoreflect.ValueOfFloat64(float64(*next)))
		case f.Kind() == protoreflect.Uint32Kind:
			m.Set(f, protoreflect.ValueOfUint32(uint32(*next)))
		default:
			m.Set(f, protoreflect.ValueOfUint64(*next))
		}
	}
}

// collect lists the numbers of a message by the last part of their field's name.
func collect(m protoreflect.Message, into map[float64]string) {
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		add := func(v protoreflect.Value) {
			switch x := v.Interface().(type) {
			case protoreflect.Message:
				collect(x, into)
			case uint64:
				into[float64(x)] = string(f.Name())
			case uint32:
				into[float64(x)] = string(f.Name())
			case float64:
				into[x] = string(f.Name())
			}
		}
		if f.IsList() {
			for i := range v.List().Len() {
				add(v.List().Get(i))
			}
			return true
		}
		add(v)
		return true
	})
}

// Each number arrives, once, under the name that it had.
func TestEveryNumberArrives(t *testing.T) {
	var r agentv1.StatsContainerResponse
	var next uint64
	fill(r.ProtoReflect(), &next)
	sent, told := map[float64]string{}, map[float64]string{}
	collect(r.ProtoReflect(), sent)
	collect(Of(&r).ProtoReflect(), told)
	for n, name := range sent {
		if told[n] != name {
			t.Errorf("%s arrives as %q", name, told[n])
		}
	}
	if len(told) != len(sent) || len(sent) < 80 {
		t.Errorf("%d numbers were sent, %d arrive", len(sent), len(told))
	}
	if m := Of(&r); m.Hugetlb[0].Pagesize != "page_size" || m.Network[0].Name != "name" {
		t.Errorf("names are lost: %v %v", m.Hugetlb, m.Network)
	}
}

func TestNothingIsTold(t *testing.T) {
	m := Of(&agentv1.StatsContainerResponse{})
	if m.CPU.GetUsageUsec() != 0 || m.Memory.GetUsage() != 0 || m.CPU.GetPSI() != nil {
		t.Errorf("got %v", m)
	}
}
