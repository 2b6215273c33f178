package shop

import (
	"os"
	"testing"

	"github.com/carpool-go/carpool/tasks/taskstest"
)

func TestMain(m *testing.M) { taskstest.Main(m) }

func TestBook_AddsTheTaxThatIsSet(t *testing.T) {
	t.Parallel()
	kit := taskstest.New(t)
	schema, err := os.ReadFile("schema.sql")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := kit.DB.Exec(t.Context(), string(schema)); err != nil {
		t.Fatal(err)
	}

	shop := &Tasks{TaxPercent: 7}
	booked, err := taskstest.RunTx(t, kit, shop.book, Order{Number: "A-17", NetCents: 1000})
	if err != nil || booked.TotalCents != 1070 {
		t.Errorf("booked %+v, error %v; want 1070 cents", booked, err)
	}
	var tax int64
	if err := kit.DB.QueryRow(t.Context(), "SELECT tax_cents FROM orders WHERE number = 'A-17'").Scan(&tax); err != nil || tax != 70 {
		t.Errorf("the table has %d cents of tax, error %v; want 70", tax, err)
	}
}
