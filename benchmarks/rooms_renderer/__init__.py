"""Render furnished rooms with exact labels: the maker of the Rooms data set; see benchmarks/render_rooms.py."""
