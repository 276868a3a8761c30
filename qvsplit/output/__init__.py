"""What people and programs read: text, table, report, progress."""
