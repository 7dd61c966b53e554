"""The router's two HTTP ports: the data plane, which passes requests on to workers, and the management port."""
