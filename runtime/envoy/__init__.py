"""Envoy as the data plane in front of our endpoint picker: its configuration, as a pure function of settings."""
