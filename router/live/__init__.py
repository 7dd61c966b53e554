"""What the live page and `kvcluster top` show: every router and worker, their history, and the latest decisions."""
