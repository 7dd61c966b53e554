"""Where the router learns which workers there are: a static list, a file, or a Service's EndpointSlices."""
