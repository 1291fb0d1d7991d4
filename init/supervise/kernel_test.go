package supervise

import "testing"

func TestMemoryKills(t *testing.T) {
	for events, want := range map[string]int{
		"low 0\nhigh 0\nmax 5\noom 1\noom_kill 2\noom_group_kill 7\n": 2,
		"low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\noom_group_kill 0\n": 0,
		"": 0,
	} {
		if got := memoryKills(events); got != want {
			t.Errorf("%q: got %d, want %d", events, got, want)
		}
	}
}
