package scheduler
import ("testing";"time";"fmt")
func BenchmarkLook(b *testing.B) {}
func TestZZ(t *testing.T) {
	b := newBench(t)
	s := b.scheduler(t)
	for i := range 100 { if err := Add(t.Context(), b.DB, Entry{Name: fmt.Sprint("e",i), Cron: "0 3 * * *", Payload: Ping{To:"x"}}, false); err != nil {t.Fatal(err)} }
	look(t,s); at := time.Now()
	for range 500 { look(t,s) }
	t.Log("look at 100 entries:", time.Since(at)/500)
	b.pass(t, 24*time.Hour)
	at = time.Now(); look(t,s); t.Log("100 due:", time.Since(at))
	sc := mustParse(t, "30 2 * * *", "Europe/Berlin")
	at = time.Now(); x := time.Now(); for range 10000 { x = sc.Next(x) }; t.Log("next", time.Since(at)/10000)
}
