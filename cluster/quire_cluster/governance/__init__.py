"""Who may use which model, how much, under which policy, and what is on record."""
