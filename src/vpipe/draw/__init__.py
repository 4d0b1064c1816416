"""Pictures of schedules and runs, as text, SVG and Chrome trace, in one palette."""
