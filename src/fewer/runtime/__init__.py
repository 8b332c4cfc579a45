"""Where methods meet models: programs, sites, sessions, traces."""
