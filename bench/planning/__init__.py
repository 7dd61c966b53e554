"""How many workers a workload needs: simulations of the cluster with more and fewer of them, against an SLO."""
