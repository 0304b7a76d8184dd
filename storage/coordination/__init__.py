"""Who may run what: studies with their budgets, claims and leases, workers, checkpoints, and what people order.

In come the wishes of workers and of people. Out go claims, each with its lease, and tables of how a study stands and
what it cost; each is decided in one transaction, on PostgreSQL's clock. Nothing here knows of samplers or of devices.
"""
