"""Keeps the fleet in step with the workers: a feed subscriber and a health prober for each, started and stopped as the
source of workers names them."""
