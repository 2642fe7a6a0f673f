"""What happens without a request. Each loop finds due work in the registry and asks the lifecycle."""
