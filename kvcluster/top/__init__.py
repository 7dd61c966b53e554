"""`kvcluster top`: the live document in a terminal."""
