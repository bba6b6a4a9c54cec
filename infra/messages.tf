locals {
  message_retention = "${var.message_retention_days * 24 * 3600}s"

  # As long as the slowest answer of start_export may take: lease, RunJob and their repetitions.
  push_seconds = 120
}

resource "google_pubsub_topic" "jobs" {
  name                       = local.topic
  message_retention_duration = local.message_retention

  depends_on = [google_project_service.used]
}

resource "google_pubsub_topic" "dead_letters" {
  name                       = "${local.topic}-dead-letters"
  message_retention_duration = local.message_retention

  depends_on = [google_project_service.used]
}

resource "google_pubsub_subscription" "start" {
  name                       = "${local.topic}-push"
  topic                      = google_pubsub_topic.jobs.id
  ack_deadline_seconds       = local.push_seconds
  message_retention_duration = local.message_retention
  retain_acked_messages      = true # or there would be nothing to replay

  push_config {
    # functions-framework knows a raw push by this form of the path.
    push_endpoint = "${google_cloud_run_v2_service.function["start_export"].uri}/${google_pubsub_topic.jobs.id}"

    oidc_token {
      service_account_email = google_service_account.invoker["push"].email
      audience              = google_cloud_run_v2_service.function["start_export"].uri
    }
  }

  # Ten deliveries take about 40 minutes, longer than a launch whose lease has to run out.
  retry_policy {
    minimum_backoff = "10s"
    maximum_backoff = "600s"
  }

  dead_letter_policy {
    dead_letter_topic     = google_pubsub_topic.dead_letters.id
    max_delivery_attempts = 10
  }

  expiration_policy {
    ttl = "" # never, however long nothing is asked for
  }
}

resource "google_pubsub_subscription" "fail" {
  name                       = "${local.topic}-dead-letters-push"
  topic                      = google_pubsub_topic.dead_letters.id
  ack_deadline_seconds       = local.push_seconds
  message_retention_duration = local.message_retention

  push_config {
    push_endpoint = "${google_cloud_run_v2_service.function["fail_export"].uri}/${google_pubsub_topic.dead_letters.id}"

    oidc_token {
      service_account_email = google_service_account.invoker["push"].email
      audience              = google_cloud_run_v2_service.function["fail_export"].uri
    }
  }

  retry_policy {
    minimum_backoff = "10s"
    maximum_backoff = "600s"
  }

  expiration_policy {
    ttl = ""
  }
}

# For a person to read; nothing acknowledges what is in it.
resource "google_pubsub_subscription" "dead_letters" {
  name                       = "${local.topic}-dead-letters-kept"
  topic                      = google_pubsub_topic.dead_letters.id
  ack_deadline_seconds       = 60
  message_retention_duration = local.message_retention

  expiration_policy {
    ttl = ""
  }
}
