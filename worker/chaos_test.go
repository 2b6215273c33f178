package main

// chaosWorker is what the test binary runs when the harness starts it as a worker.
func chaosWorker() int { return 0 }
