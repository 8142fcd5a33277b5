"""Many questions of one depth: sweeps, probes, statistics, and the rates of this machine."""
