"""Many scans: which scans, who works on which, BIDS datasets, a cluster."""
