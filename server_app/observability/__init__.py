"""What Prometheus can ask a running ServerApp."""
