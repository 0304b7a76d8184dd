"""The way to PostgreSQL: URLs, engines, tables and their migrations, and what errors become.

In come URLs, and functions that take a connection. Out go engines whose sessions are bounded in time, work that was
done in one transaction and tried again while the database was away, and every failure as an error of ours.
"""
