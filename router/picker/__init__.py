"""The endpoint picker: answers a gateway, over Envoy's ext_proc, which worker takes a request."""
