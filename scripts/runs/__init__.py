"""Plans of trainings and their processes, and the tables that they write."""
