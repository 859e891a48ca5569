"""Figures for Prometheus: kept on a board, shown by an endpoint."""
