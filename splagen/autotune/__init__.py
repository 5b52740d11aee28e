"""Which Schedules a kernel may have on a device, the search among them, and what earlier searches found."""
