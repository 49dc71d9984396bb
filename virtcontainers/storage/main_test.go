package storage

import (
	"testing"

	"github.com/husk-containers/husk/internal/ownmounts"
)

func TestMain(m *testing.M) { ownmounts.Main(m) }
