"""A Flower app of clients that send back what they are sent."""
