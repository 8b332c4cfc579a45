"""Models that exist only because of a method: trained from scratch, with the reduction inside."""
