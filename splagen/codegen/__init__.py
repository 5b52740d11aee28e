"""From Programs to kernels: partition, regions, templates, schedules, generated files."""
